//! Kills and pauses, and their ends.
//!
//! # Cancellation
//! What a fault does is noted before it is done, so [`Faults::heal`] after a dropped [`Faults::run`] undoes everything.

use std::collections::BTreeSet;
use std::time::Duration;

use cairn_common::Env;
use cairn_common::entropy::Entropy;
use cairn_common::process::Signal;
use serde::Serialize;

use super::target::Target;
use crate::units::human_millis;

const TICK: Duration = Duration::from_millis(50);
/// A member that was asked for and does not run after this is asked for again.
const ASK_AGAIN_MS: u64 = 3_000;
/// A namenode that is away longer than this would only make every operation fail.
const NAMENODE_AWAY_MS: u64 = 20_000;
/// One fault in so many is the namenode's.
const NAMENODE_SHARE: u64 = 6;
/// Shortest absence.
const SHORTEST_MS: u64 = 1_000;

/// What is done, and how often.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    pub length_ms: u64,
    pub every_ms: u64,
    pub away_ms: u64,
    /// Datanodes away at a time.
    pub down: usize,
    pub kill: bool,
    pub pause: bool,
    pub with_namenode: bool,
}

/// Faults that happened.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize)]
pub struct Counts {
    pub kill: u64,
    pub pause: u64,
    pub namenode_kill: u64,
    pub namenode_pause: u64,
    pub corrupt: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Killed,
    Paused,
}

/// A member that is away.
struct Away {
    at: usize,
    kind: Kind,
    until_ms: u64,
    asked_ms: Option<u64>,
}

/// Kills and pauses members; see the module.
pub struct Faults<'a> {
    env: &'a Env,
    target: &'a mut Target,
    rate: Rate,
    random: Entropy,
    away: Vec<Away>,
    /// What happened so far.
    pub counts: Counts,
    /// Members that ended though nobody broke them.
    pub fallen: BTreeSet<String>,
    say: &'a dyn Fn(String),
}

impl Counts {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.kill + self.pause + self.namenode_kill + self.namenode_pause + self.corrupt
    }
}

impl<'a> Faults<'a> {
    /// Nothing is broken yet.
    pub fn new(env: &'a Env, target: &'a mut Target, rate: Rate, seed: u64, say: &'a dyn Fn(String)) -> Self {
        let (away, counts, fallen) = (Vec::new(), Counts::default(), BTreeSet::new());
        Self { env, target, rate, random: Entropy::seeded(seed), away, counts, fallen, say }
    }

    /// Breaks members at the given rate for the given time. Fails only if the cluster's parent is gone.
    pub async fn run(&mut self) -> Result<(), String> {
        let clock = &self.env.clock;
        let end_ms = clock.mono_ms() + self.rate.length_ms;
        let mut next_ms = clock.mono_ms() + self.pause_ms();
        while clock.mono_ms() < end_ms {
            self.bring_back(false)?;
            if clock.mono_ms() >= next_ms && self.strike() {
                next_ms = clock.mono_ms() + self.pause_ms();
            }
            clock.sleep(TICK).await;
        }
        Ok(())
    }

    /// Lets everybody go on and come back; returns when all members run. What is stopped goes on, and what was killed is asked for, before
    /// it waits for the first time.
    pub async fn heal(&mut self, limit: Duration) -> Result<(), String> {
        let deadline_ms = self.env.clock.mono_ms() + limit.as_millis() as u64;
        loop {
            self.bring_back(true)?;
            self.target.refresh();
            let gone = (0..self.target.members().len()).find(|at| !self.target.process(*at).runs());
            match gone {
                None if self.away.is_empty() => return Ok(()),
                // It ended by itself, which is a finding of its own; it is started again all the same.
                Some(at) if self.away.iter().all(|away| away.at != at) => {
                    self.fallen.insert(self.target.members()[at].name.clone());
                    self.away.push(Away { at, kind: Kind::Killed, until_ms: 0, asked_ms: None });
                }
                _ => {}
            }
            if self.env.clock.mono_ms() > deadline_ms {
                let names: Vec<&str> = self.away.iter().map(|away| &*self.target.members()[away.at].name).collect();
                return Err(format!("{} did not come back; see its log", names.join(", ")));
            }
            self.env.clock.sleep(TICK).await;
        }
    }

    /// Half to one and a half of the interval.
    fn pause_ms(&self) -> u64 {
        self.rate.every_ms / 2 + self.random.below(self.rate.every_ms + 1)
    }

    /// Short absences are more frequent: as many of 1 to 2 s as of 30 to 60 s.
    fn absence_ms(&self, at: usize) -> u64 {
        let longest = if at == 0 { self.rate.away_ms.min(NAMENODE_AWAY_MS) } else { self.rate.away_ms };
        let share = self.random.below(1 << 20) as f64 / (1 << 20) as f64;
        (SHORTEST_MS as f64 * (longest.max(SHORTEST_MS) as f64 / SHORTEST_MS as f64).powf(share)) as u64
    }

    /// Breaks somebody; `false` if nobody may be broken now.
    fn strike(&mut self) -> bool {
        if !self.rate.kill && !self.rate.pause {
            return true;
        }
        let here = |at: &usize| self.away.iter().all(|away| away.at != *at);
        let datanodes_away = self.away.iter().filter(|away| away.at > 0).count();
        let mut candidates: Vec<usize> = Vec::new();
        if datanodes_away < self.rate.down {
            candidates.extend((1..self.target.members().len()).filter(here));
        }
        let namenode = self.rate.with_namenode && here(&0);
        let at = if namenode && self.random.below(NAMENODE_SHARE) == 0 {
            0
        } else if candidates.is_empty() {
            return false;
        } else {
            candidates[self.random.below(candidates.len() as u64) as usize]
        };
        let kill = self.rate.kill && (!self.rate.pause || self.random.below(2) == 0);
        let absence_ms = self.absence_ms(at);
        let kind = if kill { Kind::Killed } else { Kind::Paused };
        self.away.push(Away { at, kind, until_ms: self.env.clock.mono_ms() + absence_ms, asked_ms: None });
        let done = self.target.signal(at, if kill { Signal::Kill } else { Signal::Stop });
        let name = &self.target.members()[at].name;
        match done {
            Ok(()) => {
                let counter = match (at, kill) {
                    (0, true) => &mut self.counts.namenode_kill,
                    (0, false) => &mut self.counts.namenode_pause,
                    (_, true) => &mut self.counts.kill,
                    (_, false) => &mut self.counts.pause,
                };
                *counter += 1;
                let word = if kill { "kill " } else { "pause" };
                (self.say)(format!("{word} {name} for {}", human_millis(absence_ms)));
            }
            Err(error) => {
                (self.say)(format!("{name} ended by itself: {error}"));
                self.fallen.insert(name.clone());
            }
        }
        true
    }

    /// Ends what is over (`all`: everything).
    fn bring_back(&mut self, all: bool) -> Result<(), String> {
        if !self.target.local_runs() {
            return Err("`cairn local` is gone, and its members with it".into());
        }
        let now_ms = self.env.clock.mono_ms();
        if self.away.iter().any(|away| away.asked_ms.is_some()) {
            self.target.refresh();
        }
        let (target, say) = (&*self.target, self.say);
        self.away.retain_mut(|away| {
            if !all && now_ms < away.until_ms {
                return true;
            }
            let name = &target.members()[away.at].name;
            match away.kind {
                Kind::Paused => {
                    // One that is gone is found and started again when all is healed.
                    let _ = target.signal(away.at, Signal::Continue);
                    say(format!("{name} goes on"));
                    false
                }
                Kind::Killed if away.asked_ms.is_some() && target.process(away.at).runs() => {
                    say(format!("{name} is back"));
                    false
                }
                Kind::Killed => {
                    if away.asked_ms.is_none_or(|asked_ms| now_ms > asked_ms + ASK_AGAIN_MS) {
                        if let Err(error) = target.ask_for(away.at) {
                            say(format!("cannot ask for {name}: {error}"));
                        }
                        away.asked_ms = Some(now_ms);
                    }
                    true
                }
            }
        });
        Ok(())
    }
}
