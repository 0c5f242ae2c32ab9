//! Who gets the next free slot of this node: a pure core, told what happens and when.
//!
//! There is no central scheduler: every node arbitrates between the jobs that ask it. A job that finds no slot free waits here; a slot that gets free while
//! jobs wait is kept (offered) for one of them for a moment:
//!
//! 1. the user with the fewest slots for its weight, then the one that was served least so far;
//! 2. of that user's jobs the one with the fewest slots for its priority, then the one that was served least.
//!
//! What was served is slot time divided by weight, as in fair queuing; who comes new starts with the least of those who are there, so nobody is owed for the time before,
//! and everybody's turn comes however short or long tasks are. A job whose task has just ended and that has more to run takes part in
//! the choice although it could not ask yet.
//!
//! Nothing is taken from anybody, but from a job that holds more than its share while another has waited for longer than a limit without a single
//! slot ([`FairShare::starving`]). Its share is rounded up, so a task that has to stop finds a slot again only when others are done: two
//! jobs never throw each other out by turns.

use std::collections::BTreeMap;

/// A slot is kept for a job that waited for so long; then the next one has it. Longer: slots idle when a driver is gone; shorter: a busy driver
/// loses its turn.
const OFFER_MS: u64 = 1_000;
/// The same for a job whose task has just ended, which need not be told.
const RETURN_MS: u64 = 250;
/// Priority of a job that names none.
pub const USUAL_PRIORITY: u32 = 100;
/// Most that a job may name.
pub const MAX_PRIORITY: u32 = 1_000;
/// Served time is counted in these parts of a millisecond.
const SCALE: u64 = 1_000_000;

#[derive(Default)]
struct Account {
    weight: u64,
    running: u32,
    /// Slot time by weight.
    served: u64,
}

struct Share {
    user: String,
    account: Account,
    /// Slots that it waits for.
    waiting: u32,
    waiting_since_ms: u64,
    /// It could use a slot at once, as far as is known.
    backlog: u32,
    /// Slots kept for it, and until when.
    kept: u32,
    kept_until_ms: u64,
    /// Since its task ended it has not been able to ask.
    returning_until_ms: u64,
}

/// See the module.
pub struct FairShare {
    slots: u32,
    now_ms: u64,
    users: BTreeMap<String, Account>,
    jobs: BTreeMap<String, Share>,
    weights: BTreeMap<String, u64>,
}

impl Account {
    fn new(weight: u64) -> Self {
        Self { weight: weight.max(1), ..Self::default() }
    }

    fn pass(&mut self, ms: u64) {
        self.served = self.served.saturating_add(u64::from(self.running) * ms * SCALE / self.weight);
    }

    /// Smaller: sooner.
    fn rank(&self, kept: u32) -> (u64, u64) {
        (u64::from(self.running + kept) * SCALE / self.weight, self.served)
    }
}

impl FairShare {
    /// For a node of so many slots; `weights` of users, 1 for who is not named.
    pub fn new(slots: u32, weights: BTreeMap<String, u64>) -> Self {
        Self { slots, now_ms: 0, users: BTreeMap::new(), jobs: BTreeMap::new(), weights }
    }

    fn advance(&mut self, now_ms: u64) {
        let ms = now_ms.saturating_sub(self.now_ms);
        self.now_ms = self.now_ms.max(now_ms);
        if ms > 0 {
            self.users.values_mut().for_each(|user| user.pass(ms));
            self.jobs.values_mut().for_each(|job| job.account.pass(ms));
        }
    }

    /// A job is here now.
    pub fn add(&mut self, job_id: &str, user: &str, priority: u32, now_ms: u64) {
        self.advance(now_ms);
        if self.jobs.contains_key(job_id) {
            return;
        }
        let least = self.users.values().map(|other| other.served).min().unwrap_or(0);
        let weight = self.weights.get(user).copied().unwrap_or(1);
        self.users.entry(user.to_owned()).or_insert_with(|| Account { served: least, ..Account::new(weight) });
        let of_user = self.jobs.values().filter(|other| other.user == user);
        let least = of_user.map(|other| other.account.served).min().unwrap_or(0);
        let priority = if priority == 0 { USUAL_PRIORITY } else { priority.min(MAX_PRIORITY) };
        let share = Share {
            user: user.to_owned(),
            account: Account { served: least, ..Account::new(priority.into()) },
            waiting: 0,
            waiting_since_ms: 0,
            backlog: 0,
            kept: 0,
            kept_until_ms: 0,
            returning_until_ms: 0,
        };
        self.jobs.insert(job_id.to_owned(), share);
    }

    /// A job has gone, with all that it ran.
    pub fn remove(&mut self, job_id: &str, now_ms: u64) {
        self.advance(now_ms);
        let Some(gone) = self.jobs.remove(job_id) else { return };
        if let Some(user) = self.users.get_mut(&gone.user) {
            user.running = user.running.saturating_sub(gone.account.running);
        }
        if !self.jobs.values().any(|other| other.user == gone.user) {
            self.users.remove(&gone.user);
        }
    }

    fn free(&self) -> u32 {
        let taken: u32 = self.jobs.values().map(|job| job.account.running + job.kept).sum();
        self.slots.saturating_sub(taken)
    }

    /// A job asks for a slot, and could use so many more. True: it has one now; false: it waits for one.
    pub fn take(&mut self, job_id: &str, backlog: u32, now_ms: u64) -> bool {
        self.advance(now_ms);
        // A slot that is free and kept for nobody is wanted by nobody: `offers` has seen to that.
        let free = self.free() > 0;
        let Some(job) = self.jobs.get_mut(job_id) else { return false };
        job.backlog = backlog;
        job.returning_until_ms = 0;
        if job.kept > 0 {
            job.kept -= 1;
        } else if !free {
            if job.waiting == 0 {
                job.waiting_since_ms = now_ms;
            }
            job.waiting = (job.waiting + 1).min(self.slots);
            return false;
        }
        job.account.running += 1;
        if let Some(user) = self.users.get_mut(&job.user) {
            user.running += 1;
        }
        true
    }

    /// A task of the job has ended.
    pub fn give_back(&mut self, job_id: &str, now_ms: u64) {
        self.advance(now_ms);
        let Some(job) = self.jobs.get_mut(job_id) else { return };
        job.account.running = job.account.running.saturating_sub(1);
        if job.backlog > 0 {
            job.returning_until_ms = now_ms + RETURN_MS;
        }
        if let Some(user) = self.users.get_mut(&job.user) {
            user.running = user.running.saturating_sub(1);
        }
    }

    /// The job waits for so many slots from now on.
    pub fn ask(&mut self, job_id: &str, wanted: u32, now_ms: u64) {
        self.advance(now_ms);
        let slots = self.slots;
        let Some(job) = self.jobs.get_mut(job_id) else { return };
        if job.waiting == 0 {
            job.waiting_since_ms = now_ms;
        }
        job.waiting = wanted.min(slots);
        if wanted == 0 {
            (job.kept, job.backlog, job.returning_until_ms) = (0, 0, 0);
        }
    }

    /// Slots that a job waits for.
    pub fn waiting(&self, job_id: &str) -> u32 {
        self.jobs.get(job_id).map_or(0, |job| job.waiting)
    }

    /// Gives free slots to those who wait; returns the jobs that must be told, with how many they got.
    pub fn offers(&mut self, now_ms: u64) -> Vec<(String, u32)> {
        self.advance(now_ms);
        for job in self.jobs.values_mut().filter(|job| job.kept > 0 && job.kept_until_ms <= now_ms) {
            job.kept = 0;
        }
        let mut told = BTreeMap::new();
        while self.free() > 0 && self.jobs.values().any(|job| job.waiting > 0) {
            let Some(next) = self.next(now_ms) else { break };
            let Some(job) = self.jobs.get_mut(&next) else { break };
            job.kept += 1;
            if job.waiting > 0 {
                job.waiting -= 1;
                job.waiting_since_ms = now_ms;
                job.kept_until_ms = now_ms + OFFER_MS;
                *told.entry(next).or_insert(0) += 1;
            } else {
                job.returning_until_ms = 0;
                job.kept_until_ms = job.kept_until_ms.max(now_ms + RETURN_MS);
            }
        }
        told.into_iter().collect()
    }

    fn next(&self, now_ms: u64) -> Option<String> {
        let wants = |job: &Share| job.waiting > 0 || job.returning_until_ms > now_ms;
        let kept = |user: &str| self.jobs.values().filter(|job| job.user == user).map(|job| job.kept).sum();
        let users = self.jobs.values().filter(|job| wants(job)).map(|job| &job.user);
        let rank = |user: &&String| self.users.get(*user).map_or((0, 0), |account| account.rank(kept(user)));
        let user = users.min_by_key(rank)?;
        let jobs = self.jobs.iter().filter(|(_, job)| job.user == *user && wants(job));
        jobs.min_by_key(|(_, job)| job.account.rank(job.kept)).map(|(id, _)| id.clone())
    }

    /// When [`Self::offers`] has something to do although nothing happens.
    pub fn next_look_ms(&self) -> Option<u64> {
        self.jobs.values().filter(|job| job.kept > 0).map(|job| job.kept_until_ms).min()
    }

    /// A job that must give up a slot, because another has waited for `limit_ms` without one; that one counts as served.
    pub fn starving(&mut self, limit_ms: u64, now_ms: u64) -> Option<String> {
        self.advance(now_ms);
        let starves = |job: &Share| {
            job.waiting > 0
                && job.account.running + job.kept == 0
                && now_ms.saturating_sub(job.waiting_since_ms) >= limit_ms
        };
        let hungry = self.jobs.iter().find(|(_, job)| starves(job)).map(|(id, _)| id.clone())?;
        let active = self.jobs.values().filter(|job| job.account.running + job.kept + job.waiting > 0).count();
        let fair = self.slots.div_ceil(active.max(1) as u32);
        let over = self.jobs.iter().filter(|(_, job)| job.account.running > fair);
        let victim = over.max_by_key(|(_, job)| job.account.running).map(|(id, _)| id.clone())?;
        if let Some(job) = self.jobs.get_mut(&hungry) {
            job.waiting_since_ms = now_ms;
        }
        Some(victim)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(slots: u32, jobs: &[(&str, &str, u32)]) -> FairShare {
        let mut share = FairShare::new(slots, [("rich".to_owned(), 3)].into());
        jobs.iter().for_each(|(job, user, priority)| share.add(job, user, *priority, 0));
        share
    }

    /// Runs tasks of `ms` each on a node whose jobs always want more; returns how many tasks of each job ended.
    fn run(share: &mut FairShare, tasks: &[(&str, u64)], until_ms: u64) -> BTreeMap<String, u32> {
        let mut running: Vec<(u64, String)> = Vec::new();
        let mut ended: BTreeMap<String, u32> = BTreeMap::new();
        for now in 0..until_ms {
            for (end, job) in std::mem::take(&mut running) {
                if end <= now {
                    share.give_back(&job, now);
                    *ended.entry(job).or_default() += 1;
                } else {
                    running.push((end, job));
                }
            }
            share.offers(now);
            for (job, ms) in tasks {
                while share.waiting(job) == 0 && share.take(job, 5, now) {
                    running.push((now + ms, (*job).to_owned()));
                }
                let kept = share.jobs[*job].kept;
                for _ in 0..kept {
                    assert!(share.take(job, 5, now));
                    running.push((now + ms, (*job).to_owned()));
                }
            }
            assert!(running.len() <= share.slots as usize);
        }
        ended
    }

    #[test]
    fn two_users_share_and_one_with_many_jobs_gets_no_more() {
        let mut share = share(4, &[("a1", "ann", 0), ("a2", "ann", 0), ("a3", "ann", 0), ("b1", "bob", 0)]);
        let ended = run(&mut share, &[("a1", 10), ("a2", 10), ("a3", 10), ("b1", 10)], 4_000);
        let ann: u32 = ["a1", "a2", "a3"].iter().map(|job| ended[*job]).sum();
        assert!(ann.abs_diff(ended["b1"]) <= ended["b1"] / 10, "{ended:?}");
        assert!(ended["a1"].abs_diff(ended["a3"]) <= ended["a1"] / 5, "{ended:?}");
    }

    #[test]
    fn slot_time_counts_not_the_number_of_tasks() {
        let mut share = share(1, &[("long", "ann", 0), ("short", "bob", 0)]);
        let ended = run(&mut share, &[("long", 100), ("short", 10)], 10_000);
        let ratio = f64::from(ended["short"]) / f64::from(ended["long"]);
        assert!((8.0..=12.0).contains(&ratio), "{ended:?}");
    }

    #[test]
    fn weights_of_users_and_priorities_of_jobs_count() {
        let mut share = share(4, &[("r", "rich", 0), ("p", "poor", 0)]);
        let ended = run(&mut share, &[("r", 10), ("p", 10)], 8_000);
        let ratio = f64::from(ended["r"]) / f64::from(ended["p"]);
        assert!((2.5..=3.5).contains(&ratio), "{ended:?}");
        let mut share = self::share(1, &[("high", "ann", 400), ("low", "ann", 100)]);
        let ended = run(&mut share, &[("high", 10), ("low", 10)], 8_000);
        let ratio = f64::from(ended["high"]) / f64::from(ended["low"]);
        assert!((3.0..=5.0).contains(&ratio), "{ended:?}");
    }

    #[test]
    fn alone_a_job_is_never_kept_waiting() {
        let mut share = share(2, &[("a", "ann", 0)]);
        assert!(share.take("a", 9, 0) && share.take("a", 9, 0) && !share.take("a", 9, 0));
        share.ask("a", 0, 1);
        share.give_back("a", 5);
        assert!(share.offers(5).is_empty());
        assert!(share.take("a", 9, 5));
    }

    #[test]
    fn a_slot_is_kept_for_who_waits_and_passed_on_if_nobody_comes() {
        let mut share = share(1, &[("a", "ann", 0), ("b", "bob", 0), ("c", "cid", 0)]);
        assert!(share.take("a", 0, 0) && !share.take("b", 0, 1) && !share.take("c", 0, 2));
        share.give_back("a", 10);
        assert_eq!(share.offers(10), [("b".to_owned(), 1)]);
        assert!(!share.take("a", 0, 11), "it is kept for another");
        let look = share.next_look_ms().unwrap();
        assert_eq!(look, 10 + OFFER_MS);
        assert!(share.offers(look - 1).is_empty());
        assert_eq!(share.offers(look).len(), 1);
        share.remove("a", look);
        assert!(share.take("c", 0, look + 1));
    }

    #[test]
    fn who_comes_back_at_once_keeps_its_share() {
        let mut share = share(2, &[("a", "ann", 0), ("b", "bob", 0)]);
        assert!(share.take("a", 5, 0) && share.take("b", 5, 0) && !share.take("b", 5, 1));
        share.give_back("a", 10);
        // The other one waits for a second slot, but this is the only one of this job.
        assert!(share.offers(10).is_empty());
        assert!(share.take("a", 5, 12));
        share.give_back("a", 20);
        share.offers(20);
        assert_eq!(share.offers(20 + RETURN_MS), [("b".to_owned(), 1)], "it did not come");
    }

    #[test]
    fn only_who_has_more_than_its_share_gives_up_a_slot_and_only_to_who_has_none() {
        let mut share = share(4, &[("a", "ann", 0), ("b", "bob", 0)]);
        (0..4).for_each(|_| assert!(share.take("a", 5, 0)));
        assert!(!share.take("b", 5, 100));
        assert_eq!(share.starving(1_000, 1_099), None);
        assert_eq!(share.starving(1_000, 1_100), Some("a".into()));
        assert_eq!(share.starving(1_000, 1_101), None, "one at a time");
        share.give_back("a", 1_102);
        assert_eq!(share.offers(1_102), [("b".to_owned(), 1)]);
        assert!(share.take("b", 5, 1_103) && !share.take("b", 5, 1_104));
        assert_eq!(share.starving(1_000, 9_000), None, "it has one");
        let mut one = self::share(1, &[("a", "ann", 0), ("b", "bob", 0)]);
        assert!(one.take("a", 5, 0) && !one.take("b", 5, 0));
        assert_eq!(one.starving(1_000, 9_000), None, "half of one slot is one slot");
    }
}
