//! The trash is emptied here, so that it is emptied for users who never come back.
//!
//! Clients move what is deleted to `/user/NAME/.Trash/Current`. Every quarter of the trash interval `Current` becomes a
//! folder named by its time (milliseconds since 1970), and such a folder is deleted when it is one interval old. So what
//! was deleted stays for one interval at least and little more than one and a quarter. All state is in the names: a restart
//! forgets nothing.
//!
//! A wall clock that jumps forward must not empty everything at once: nothing is deleted in the hour after such a jump, nor in the
//! first hour after a start, so that a wrong clock can be set right.

use cairn_proto::pb::{self, edit::Kind};

use super::tree::ROOT;
use super::{Carries, Core, Turn};

const CURRENT: &str = "Current";
/// Nothing is deleted for this long (or one interval, if that is less) after a start, or after the wall clock jumped forward.
const GRACE_MS: u64 = 3_600_000;
/// The wall clock may get ahead of the monotonic one by so much between two looks.
const JUMP_MS: i64 = 60_000;
/// Longest time between two looks.
const LOOK_MS: u64 = 60_000;

/// What is to be done in one user's trash.
#[derive(Default)]
struct Plan {
    rotate: Option<u64>,
    old: Vec<u64>,
}

impl Core {
    /// Looks into the trash of some users; the rest have their turn at the next looks.
    pub(super) fn empty_trash(&mut self, turn: &mut Turn<'_>) {
        let interval_ms = self.settings.trash_interval_ms;
        if interval_ms == 0 || self.safemode.is_on() || self.now_ms < self.trash_due_ms {
            return;
        }
        let period_ms = (interval_ms / 4).max(1);
        let may_delete = self.trust_wall(turn.wall_ms, GRACE_MS.min(interval_ms));
        self.trash_due_ms = self.now_ms + period_ms.min(LOOK_MS);
        let Some(users) = self.tree.child(ROOT, "user") else { return };
        let budget = self.settings.cursor_budget;
        let (_, homes) = self.tree.children_after(users, self.trash_after.as_bytes());
        let homes: Vec<u64> = homes.take(budget).collect();
        self.trash_after = match homes.last().and_then(|home| self.tree.get(*home)) {
            Some(last) if homes.len() == budget => (*last.name).into(),
            _ => "".into(),
        };
        for home in homes {
            let Some(trash) = self.tree.child(home, ".Trash") else { continue };
            let plan = self.plan_trash(trash, turn.wall_ms, interval_ms, period_ms);
            self.unsynced.reset();
            for inode in plan.old.into_iter().filter(|_| may_delete) {
                // The state was just looked at: an edit that is refused now is one for the next look.
                let _ = self.commit(turn, Carries::Nothing, Kind::Delete(pb::EditDelete { inode, parent: trash }));
            }
            if let Some(inode) = plan.rotate {
                let to_name = bytes::Bytes::from(turn.wall_ms.to_string());
                let edit = pb::EditRename { inode, from_parent: trash, to_parent: trash, to_name, replaces: 0 };
                let _ = self.commit(turn, Carries::Nothing, Kind::Rename(edit));
            }
        }
        self.free_now();
    }

    /// Whether the wall clock has gone steadily for `grace_ms`.
    fn trust_wall(&mut self, wall_ms: u64, grace_ms: u64) -> bool {
        let ahead_ms = wall_ms as i64 - self.last_mono_ms as i64;
        if ahead_ms > self.wall_ahead_ms + JUMP_MS {
            self.steady_since_ms = self.now_ms;
        }
        self.wall_ahead_ms = ahead_ms;
        self.now_ms >= self.steady_since_ms + grace_ms
    }

    fn plan_trash(&self, trash: u64, wall_ms: u64, interval_ms: u64, period_ms: u64) -> Plan {
        let mut plan = Plan::default();
        let mut newest = None;
        // Folders named by a time: five of them when all goes well.
        let (_, entries) = self.tree.children_after(trash, b"");
        for id in entries.take(self.settings.cursor_budget) {
            let Some(inode) = self.tree.get(id) else { continue };
            let is_time = inode.name.len() >= 13 && inode.name.bytes().all(|byte| byte.is_ascii_digit());
            let Some(time_ms) = inode.name.parse::<u64>().ok().filter(|_| is_time) else { continue };
            newest = newest.max(Some(time_ms));
            if time_ms.saturating_add(interval_ms) <= wall_ms {
                plan.old.push(id);
            }
        }
        let current = self.tree.child(trash, CURRENT).and_then(|id| self.tree.get(id).map(|inode| (id, inode)));
        if let Some((id, inode)) = current.filter(|(_, inode)| inode.child_count() > 0) {
            // Without a dated folder nothing tells when the first thing came: a quiet or a long time is enough.
            let since_ms = newest.unwrap_or(inode.modified_ms);
            let ran_long = newest.is_none() && self.now_ms >= self.started_ms + period_ms;
            if ran_long || since_ms.saturating_add(period_ms) <= wall_ms {
                plan.rotate = Some(id).filter(|_| newest != Some(wall_ms));
            }
        }
        plan
    }
}
