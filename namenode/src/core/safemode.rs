//! Safe mode: the namespace can be read but not changed until enough blocks have a reported replica.

use cairn_proto::pb::{self, SafeModeAction};
use cairn_proto::{Error, ErrorCode};

use super::Core;
use super::permissions::Who;
use super::repair::REPORTING_MS;

/// Why safe mode is on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum State {
    #[default]
    Off,
    /// Since the start, until blocks are reported; `Some`: the conditions hold since then (turn time).
    Startup { holds_since_ms: Option<u64> },
    /// Switched on by hand.
    Manual,
}

/// See the module.
#[derive(Default)]
pub struct SafeMode {
    state: State,
}

impl SafeMode {
    /// On, until blocks are reported.
    pub fn at_start() -> Self {
        Self { state: State::Startup { holds_since_ms: None } }
    }

    /// Whether changes are refused.
    pub fn is_on(&self) -> bool {
        self.state != State::Off
    }

    /// Whether it is on since the start, and not because a person wants it.
    pub fn is_startup(&self) -> bool {
        matches!(self.state, State::Startup { .. })
    }
}

/// 1234567 as "1,234,567".
pub fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

impl Core {
    /// Blocks that must have a reported replica.
    fn safe_blocks_needed(&self) -> u64 {
        // The product of a share below one and a count below 2^53: exact enough, and rounded down as HDFS does.
        (self.repair.complete as f64 * self.settings.safemode_threshold) as u64
    }

    /// Whether as much is reported as may be waited for. Of a few blocks, or of the one in a thousand that the threshold leaves out, the only node may
    /// yet have to come: until it had the time to, nobody shall take them for lost.
    fn enough_is_reported(&self) -> bool {
        let all = self.repair.safe >= self.repair.complete;
        // A datanode that begins its report again and again holds nobody up for longer than one report may take.
        let patience_ms = self.settings.dead_interval_ms + REPORTING_MS;
        let waited = self.everybody_has_come() || self.now_ms >= self.started_ms + patience_ms;
        all || self.repair.safe >= self.safe_blocks_needed() && waited
    }

    /// Leaves safe mode once its conditions hold.
    pub(super) fn check_safemode(&mut self) {
        let State::Startup { holds_since_ms } = self.safemode.state else { return };
        if !self.enough_is_reported() {
            self.safemode.state = State::Startup { holds_since_ms: None };
            return;
        }
        let since = holds_since_ms.unwrap_or(self.now_ms);
        let over = self.repair.complete == 0 || self.now_ms >= since + self.settings.safemode_extension_ms;
        self.safemode.state = if over { State::Off } else { State::Startup { holds_since_ms: Some(since) } };
    }

    /// What safe mode waits for; empty when it is off.
    pub(super) fn safemode_reason(&self) -> String {
        match self.safemode.state {
            State::Off => String::new(),
            State::Manual => {
                let note = self.restore_note();
                format!("Safe mode was switched on by hand; `cairn admin safemode leave` ends it.{note}")
            }
            State::Startup { holds_since_ms: Some(since) } => {
                let left = (since + self.settings.safemode_extension_ms).saturating_sub(self.now_ms);
                format!("Enough blocks are reported; safe mode ends in {left} ms.")
            }
            State::Startup { holds_since_ms: None } => {
                let missing = self.safe_blocks_needed().saturating_sub(self.repair.safe);
                let wanted = match missing {
                    0 => "the others may be on datanodes that have yet to come".to_owned(),
                    more => format!("{} more are needed", grouped(more)),
                };
                let mut text = format!(
                    "Waiting for block reports: {} of {} blocks have a reported replica, {wanted}.",
                    grouped(self.repair.safe),
                    grouped(self.repair.complete),
                );
                text.push_str(&self.silent_nodes());
                text.push_str(&self.restore_note());
                text
            }
        }
    }

    fn silent_nodes(&self) -> String {
        let silent: Vec<&str> = self.nodes.nodes.iter().filter(|node| !node.reported).map(|node| &*node.host).collect();
        if silent.is_empty() {
            return " All known datanodes have reported.".into();
        }
        let shown = silent.iter().take(5).copied().collect::<Vec<_>>().join(", ");
        let more = if silent.len() > 5 { ", ..." } else { "" };
        let all = self.nodes.nodes.len();
        format!(" {} of {all} known datanodes have not reported yet: {shown}{more}.", silent.len())
    }

    /// Refuses a change while safe mode is on.
    pub(super) fn check_not_safemode(&self, doing: &str, path: &str) -> Result<(), Error> {
        if !self.safemode.is_on() {
            return Ok(());
        }
        let message = format!("Cannot {doing} {path}. Name node is in safe mode. {}", self.safemode_reason());
        Err(Error::new(ErrorCode::SafeMode, message).with_subject(path))
    }

    pub(super) fn safe_mode(
        &mut self,
        who: &Who<'_>,
        request: &pb::SafeModeRequest,
    ) -> Result<pb::SafeModeResponse, Error> {
        match request.action() {
            SafeModeAction::SafemodeGet => {}
            SafeModeAction::SafemodeEnter => {
                self.check_superuser(who)?;
                self.safemode.state = State::Manual;
            }
            SafeModeAction::SafemodeLeave => {
                self.check_superuser(who)?;
                self.safemode.state = State::Off;
            }
        }
        Ok(pb::SafeModeResponse { on: self.safemode.is_on(), reason: self.safemode_reason() })
    }
}
