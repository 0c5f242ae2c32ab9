//! What the node knows of one job.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use cairn_common::clock::Clock;
use cairn_common::process;
use cairn_proto::pb::task_event::Event as What;
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::sync::oneshot;

use super::cgroup::Group;
use super::memory::Sampler;
use super::worker::WorkerHandle;

/// A task attempt's name in maps: kind, index, attempt.
pub type TaskKey = (i32, u32, u32);
/// Where an offer of slots stands among them.
const OFFER: TaskKey = (-1, 0, 0);

pub fn key_of(task: &pb::TaskId) -> TaskKey {
    (task.kind, task.index, task.attempt)
}

/// "map 3 attempt 0", for people.
pub fn describe(task: &pb::TaskId) -> String {
    let kind = if task.kind() == pb::TaskKind::Reduce { "reduce" } else { "map" };
    format!("{kind} {} attempt {}", task.index, task.attempt)
}

/// "map-00003-0", for files.
pub fn file_name(task: &pb::TaskId) -> String {
    let kind = if task.kind() == pb::TaskKind::Reduce { "reduce" } else { "map" };
    format!("{kind}-{:05}-{}", task.index, task.attempt)
}

/// A driver that waits for news.
pub struct Watcher {
    pub after: u64,
    pub deadline_ms: u64,
    pub reply: oneshot::Sender<Result<pb::WatchTasksResponse>>,
}

/// A job on this node.
///
/// ```text
/// registered ──End, lease over, Stop──▶ ending ──last worker gone──▶ removed
/// ```
pub struct Job {
    pub description: pb::JobDescription,
    pub user: String,
    pub epoch: u64,
    pub dir: PathBuf,
    /// When its driver was last heard, milliseconds.
    pub heard_ms: u64,
    /// Every attempt that was ever started here.
    pub started: HashMap<TaskKey, ()>,
    /// Maps and attempts whose outputs are kept.
    pub held: BTreeSet<(u32, u32)>,
    /// Bytes of those.
    pub held_bytes: u64,
    /// How it stands, as its driver said, and when.
    pub status: Option<(pb::JobStatus, u64)>,
    /// Ends of attempts, in order.
    log: Vec<pb::TaskEvent>,
    /// The newest progress of attempts that run.
    progress: HashMap<TaskKey, pb::TaskEvent>,
    sequence: u64,
    watchers: Vec<Watcher>,
    /// Whom to tell when nothing is left of it.
    pub ending: Option<Vec<oneshot::Sender<Result<pb::EndJobResponse>>>>,
    /// It ends here because its driver was not heard for too long, not because somebody said so.
    pub unheard: bool,
}

impl Job {
    pub fn new(description: pb::JobDescription, user: String, epoch: u64, dir: PathBuf, now_ms: u64) -> Self {
        Self {
            description,
            user,
            epoch,
            dir,
            heard_ms: now_ms,
            started: HashMap::new(),
            held: BTreeSet::new(),
            held_bytes: 0,
            status: None,
            log: Vec::new(),
            progress: HashMap::new(),
            sequence: 0,
            watchers: Vec::new(),
            ending: None,
            unheard: false,
        }
    }

    pub fn folder(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Records what happened to an attempt and tells the drivers that wait.
    pub fn record(&mut self, task: pb::TaskId, what: What, slots_used: u32) {
        self.sequence += 1;
        let key = key_of(&task);
        let progress = matches!(what, What::Progress(_));
        let event = pb::TaskEvent { sequence: self.sequence, task: Some(task), event: Some(what) };
        if progress {
            self.progress.insert(key, event);
        } else {
            self.progress.remove(&key);
            self.log.push(event);
        }
        for watcher in std::mem::take(&mut self.watchers) {
            self.answer(watcher, slots_used);
        }
    }

    /// A slot is kept for it.
    pub fn offer(&mut self, slots: u32, slots_used: u32) {
        self.sequence += 1;
        let event = Some(What::Offer(pb::SlotOffer { slots }));
        // Only the newest counts: it stands among what is told once.
        self.progress.insert(OFFER, pb::TaskEvent { sequence: self.sequence, task: None, event });
        for watcher in std::mem::take(&mut self.watchers) {
            self.answer(watcher, slots_used);
        }
    }

    /// Since when no driver has been heard; 0 while one waits for news.
    pub fn silent_ms(&self, now_ms: u64) -> u64 {
        let listens = self.watchers.iter().any(|watcher| !watcher.reply.is_closed());
        if listens { 0 } else { now_ms.saturating_sub(self.heard_ms) }
    }

    /// How long its driver may be silent.
    pub fn lease_ms(&self, usual_ms: u64) -> u64 {
        if self.description.lease_ms == 0 { usual_ms } else { self.description.lease_ms }
    }

    /// Answers a driver that asks for news, or has it wait.
    pub fn watch(&mut self, watcher: Watcher, now_ms: u64, slots_used: u32) {
        let news = self.sequence > watcher.after;
        if news || watcher.deadline_ms <= now_ms || self.ending.is_some() {
            self.answer(watcher, slots_used);
        } else {
            self.watchers.push(watcher);
        }
    }

    /// Answers those who have waited long enough.
    pub fn release_watchers(&mut self, now_ms: u64, slots_used: u32) {
        let (due, waiting) = std::mem::take(&mut self.watchers)
            .into_iter()
            .partition(|watcher| watcher.deadline_ms <= now_ms || watcher.reply.is_closed());
        self.watchers = waiting;
        let due: Vec<Watcher> = due;
        for watcher in due {
            if !watcher.reply.is_closed() {
                // It listened until now.
                self.heard_ms = now_ms;
            }
            self.answer(watcher, slots_used);
        }
    }

    fn answer(&self, watcher: Watcher, slots_used: u32) {
        let from = self.log.partition_point(|event| event.sequence <= watcher.after);
        let mut events = self.log[from..].to_vec();
        events.extend(self.progress.values().filter(|event| event.sequence > watcher.after).cloned());
        events.sort_by_key(|event| event.sequence);
        // A driver that has left asks again or lets the lease run out.
        let _ = watcher.reply.send(Ok(pb::WatchTasksResponse { events, slots_used }));
    }

    /// Nobody is answered any more: the job is gone.
    pub fn dismiss(&mut self) {
        for watcher in self.watchers.drain(..) {
            let _ = watcher.reply.send(Err(unknown_job(&self.description.job_id)));
        }
        for reply in self.ending.take().unwrap_or_default() {
            let _ = reply.send(Ok(pb::EndJobResponse {}));
        }
    }
}

pub fn unknown_job(job_id: &str) -> Error {
    Error::new(ErrorCode::FileNotFound, format!("this node knows no job {job_id:?}")).with_subject(job_id)
}

/// An attempt that a worker serves.
pub struct Running {
    pub task: pb::TaskId,
    pub started_ms: u64,
    /// When it last told of progress, and how far it was.
    pub progress_ms: u64,
    pub bytes: u64,
    /// Resident bytes now, and the most that were seen.
    pub memory: u64,
    pub peak: u64,
    /// Bytes of its work folder, as last measured.
    pub disk_bytes: u64,
    pub work_dir: PathBuf,
    pub map_output: PathBuf,
    pub sampler: Sampler,
    /// Why it is being killed.
    pub doomed: Option<Doom>,
}

/// Why an attempt is killed.
pub enum Doom {
    /// Somebody asked.
    Asked,
    /// It used more than it may, or stands still: this is what to say.
    Fault(Error),
    /// It had ended well, and then was found to have used more than it may.
    Late(Error),
    /// Its slot is needed more elsewhere.
    Preempted,
}

/// A worker process.
///
/// ```text
/// idle ◀──Report── busy
///   └────Start────▶ ┘        either ──killed──▶ exited (removed)
/// ```
pub struct Worker {
    pub job_id: String,
    pub handle: WorkerHandle,
    /// The limits that the kernel holds it to, if it does.
    pub group: Option<Group>,
    pub running: Option<Running>,
    pub idle_since_ms: u64,
}

impl Worker {
    /// Kills it with all that it has started, also what has left its process group.
    pub fn kill(&self) {
        process::kill_tree(self.handle.pid);
        self.bury();
    }

    /// Kills what it may have left behind; its own number may be somebody else's by now.
    pub fn bury(&self) {
        if let Some(group) = &self.group {
            group.kill();
        }
        process::kill_group(self.handle.pid);
    }
}

impl Running {
    pub fn elapsed_ms(&self, clock: &Clock) -> u64 {
        clock.mono_ms().saturating_sub(self.started_ms)
    }
}

/// Job ids become names of folders and files.
pub fn check_job_id(job_id: &str) -> Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if (1..=64).contains(&job_id.len()) && job_id.bytes().all(plain) {
        return Ok(());
    }
    let text = format!("job id {job_id:?} is not 1 to 64 letters, digits, '-' and '_'");
    Err(Error::new(ErrorCode::InvalidArgument, text))
}

/// Puts a path of ours into a message; all are UTF-8 unless the operator's folder is not.
pub fn text_of(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
