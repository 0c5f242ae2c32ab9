//! The one owner of the core.
//!
//! # Overview
//! A dedicated thread (a task in simulation) takes what waits in its queue, gives each event to the core, hands the edits
//! to the journal as one batch, and holds every answer until the transaction that it depends on is durable ([`Hold`]).
//! Between events it lets time pass (ticks) and takes slices of a checkpoint, each for at most a millisecond.
//!
//! ```text
//!  handlers ──Inbox──▶ owner ──batches──▶ journal thread
//!      ▲                │  ▲                  │
//!      └── answers ─────┘  └──── durable ─────┘      (a watch channel: the journal never waits for the owner)
//!                       └──pages──▶ image thread
//! ```
//!
//! # A slow disk
//! While the journal's queue is full the owner does not wait for it: calls that change something are put aside, everything
//! else (heartbeats, reports, reads, time) goes on. When too many are put aside nothing is taken from the queue any more,
//! and time stands still: nobody may be found silent who is not listened to.
//!
//! # Crash
//! If the journal stops (no directory is left) nothing more is answered: the owner ends, every waiting call is told so, and
//! [`super::Running::failed`] returns.
//!
//! # Cancellation
//! A caller that goes away leaves its answer to nobody; the work is done all the same.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use cairn_common::Env;
use cairn_proto::ids::TxId;
use cairn_proto::{Error, ErrorCode, Result, pb};
use futures_util::FutureExt as _;
use tokio::sync::{mpsc, oneshot, watch};

use super::checkpoint::{Checkpoint, CheckpointKnobs};
use super::hold::Hold;
use crate::core::{Caller, ClientRequest, ClientResponse, Command, Core, Event, Now, ReplyTo, Response, StreamId};
use crate::image::Imager;
use crate::journal::{Batch, Journal, JournalStatus};

/// Events taken from the queue in one turn: bounds how long an answer waits for the events behind it.
const EVENTS_PER_TURN: usize = 256;
/// Calls that wait for a journal that is behind. Then the queue itself waits.
const MAX_PUT_ASIDE: usize = 4_096;

/// An answer to somebody who waits.
pub type Answer<T> = oneshot::Sender<Result<T>>;

/// The way down a report stream. Dropping it ends the stream, in both directions.
pub struct Down {
    /// Where messages go.
    pub messages: mpsc::Sender<Result<pb::ReportDown, tonic::Status>>,
    /// Dropped with it: who reads the node's messages then stops.
    pub _open: oneshot::Sender<()>,
}

/// What handlers send to the owner.
pub enum Inbox {
    /// A client calls.
    Client {
        /// Who.
        caller: Caller,
        /// What.
        request: ClientRequest,
        /// Where the answer goes.
        answer: Answer<ClientResponse>,
    },
    /// A datanode registers.
    Register {
        /// Address of the peer.
        peer_ip: String,
        /// What it says.
        request: pb::RegisterRequest,
        /// Where the answer goes.
        answer: Answer<pb::RegisterResponse>,
    },
    /// A datanode's heartbeat.
    Heartbeat {
        /// What it says.
        request: pb::HeartbeatRequest,
        /// Where the answer goes.
        answer: Answer<pb::HeartbeatResponse>,
    },
    /// A report stream begins.
    ReportOpened {
        /// Its name.
        stream: StreamId,
        /// Its first message.
        open: pb::ReportOpen,
        /// The way down.
        down: Down,
    },
    /// A message of a report stream.
    Report {
        /// Which stream.
        stream: StreamId,
        /// The message.
        report: pb::ReportUp,
    },
    /// A report stream ended.
    ReportClosed {
        /// Which stream.
        stream: StreamId,
    },
    /// Write an image.
    Checkpoint {
        /// Who; only a superuser may.
        caller: Caller,
        /// Where the answer goes.
        answer: Answer<pb::CheckpointResponse>,
    },
    /// Something that the server does itself, and only for superusers.
    CheckSuperuser {
        /// Who.
        caller: Caller,
        /// Where the answer goes.
        answer: Answer<()>,
    },
    /// End in order.
    Stop,
}

enum Waiter {
    Client(Answer<ClientResponse>),
    Register(Answer<pb::RegisterResponse>),
    Heartbeat(Answer<pb::HeartbeatResponse>),
}

impl Waiter {
    fn answer(self, result: Result<Response>) {
        // The caller may have gone away; then nobody misses the answer.
        match self {
            Self::Client(answer) => {
                let _ = answer.send(result.and_then(|response| match response {
                    Response::Client(response) => Ok(response),
                    _ => Err(wrong_answer()),
                }));
            }
            Self::Register(answer) => {
                let _ = answer.send(result.and_then(|response| match response {
                    Response::Register(response) => Ok(response),
                    _ => Err(wrong_answer()),
                }));
            }
            Self::Heartbeat(answer) => {
                let _ = answer.send(result.and_then(|response| match response {
                    Response::Heartbeat(response) => Ok(response),
                    _ => Err(wrong_answer()),
                }));
            }
        }
    }
}

fn wrong_answer() -> Error {
    Error::new(ErrorCode::Internal, "the namenode gave the answer to another kind of call")
}

/// What the owner needs besides the core.
pub struct OwnerParts {
    /// The machine.
    pub env: Env,
    /// The log.
    pub journal: Journal,
    /// The image writer.
    pub imager: Imager,
    /// When to write images.
    pub checkpoints: CheckpointKnobs,
    /// Longest time between two ticks.
    pub tick_ms: u64,
    /// The queue.
    pub inbox: mpsc::Receiver<Inbox>,
}

/// What leaves once it may.
enum Outgoing {
    Reply(ReplyTo, Result<Response>),
    Report(StreamId, pb::ReportDown),
}

struct Owner {
    env: Env,
    core: Core,
    hold: Hold<Outgoing>,
    waiters: BTreeMap<ReplyTo, Waiter>,
    streams: BTreeMap<StreamId, Down>,
    next_reply: u64,
    commands: Vec<Command>,
    /// Streams ended from this side, of which the core is still to be told.
    closed: Vec<StreamId>,
    /// Edits that the journal has not been given yet.
    batch: Batch,
    /// Whether the journal had no room for edits of an earlier turn.
    is_behind: bool,
    /// Calls that change something, while that is so.
    put_aside: VecDeque<Inbox>,
    /// Callers that want an image.
    images_asked: Vec<Answer<pb::CheckpointResponse>>,
    /// Whether replicas from the future were complained about.
    warned: bool,
    stopping: bool,
}

/// Runs until it is told to stop (`Ok`) or the log fails.
pub async fn run(core: Core, parts: OwnerParts) -> Result<()> {
    let OwnerParts { env, journal, imager, checkpoints, tick_ms, mut inbox } = parts;
    let mut status = journal.status();
    let durable = status.borrow_and_update().durable;
    let mut owner = Owner::new(env.clone(), core, durable);
    let mut checkpoint = Checkpoint::new(checkpoints, env.clock.mono_ms());
    let mut events = Vec::with_capacity(EVENTS_PER_TURN);
    let mut next_tick = env.clock.mono_ms();
    let mut end = Ok(());
    // What the start itself logged is durable already.
    owner.event(Event::Synced { txid: durable });
    while !owner.stopping && end.is_ok() {
        let now_ms = env.clock.mono_ms();
        let listens = owner.put_aside.len() < MAX_PUT_ASIDE;
        if now_ms >= next_tick {
            if listens {
                // Heartbeats that came in while the process stood still count before the timers that they keep alive.
                for _ in 0..inbox.len() {
                    let Ok(event) = inbox.try_recv() else { break };
                    owner.receive(event);
                }
                owner.event(Event::Tick);
            }
            next_tick = env.clock.mono_ms() + tick_ms;
        } else if !owner.is_behind && !owner.put_aside.is_empty() {
            owner.take_put_aside();
        } else {
            let has_work = listens && owner.core.has_work();
            let is_full = !journal.has_room();
            tokio::select! { biased;
                changed = status.changed() => if changed.is_err() {
                    // The journal's thread is gone; were it in order, its handle would be too.
                    end = Err(log_failure(&status));
                    break;
                },
                () = journal.room(), if is_full => {}
                written = checkpoint.written(), if !is_full => {
                    checkpoint.finished(written, &mut owner.core, &journal, &env.clock).await;
                }
                taken = inbox.recv_many(&mut events, EVENTS_PER_TURN), if listens => {
                    owner.take_all(taken, &mut events);
                    // Images and cursors must get on also while the queue is never empty.
                    let room = imager.room().now_or_never().filter(|_| checkpoint.wants_room(owner.hold.durable()));
                    if let Some(room) = room {
                        checkpoint.step(room, &mut owner.core, &env.clock);
                    }
                    if owner.core.has_work() {
                        owner.event(Event::Tick);
                    }
                }
                room = imager.room(), if checkpoint.wants_room(owner.hold.durable()) => {
                    checkpoint.step(room, &mut owner.core, &env.clock);
                }
                () = std::future::ready(()), if has_work => owner.event(Event::Tick),
                () = env.clock.sleep(Duration::from_millis(next_tick - now_ms)) => {}
            }
            if has_work {
                // Otherwise a long cursor would keep the timers of this thread from being looked at.
                tokio::task::yield_now().await;
            }
        }
        end = owner.upkeep(&mut status, &journal);
        checkpoint.ask(&mut owner.images_asked);
        // An image begins behind everything that the journal was given, and with a request to it.
        let can_begin = end.is_ok() && !owner.is_behind && journal.has_room();
        if can_begin && checkpoint.is_due(owner.core.last_txid(), env.clock.mono_ms()) {
            checkpoint.begin(&mut owner.core, &journal, &imager, &env.clock).await;
        }
    }
    owner.finish(end, inbox, journal, imager).await
}

impl Owner {
    fn new(env: Env, core: Core, durable: TxId) -> Self {
        Self {
            env,
            core,
            hold: Hold::new(durable),
            waiters: BTreeMap::new(),
            streams: BTreeMap::new(),
            next_reply: 0,
            commands: Vec::new(),
            closed: Vec::new(),
            batch: Vec::new(),
            is_behind: false,
            put_aside: VecDeque::new(),
            images_asked: Vec::new(),
            warned: false,
            stopping: false,
        }
    }

    /// Takes what `recv_many` gave; nothing means that nobody can send any more.
    fn take_all(&mut self, taken: usize, events: &mut Vec<Inbox>) {
        self.stopping |= taken == 0;
        for event in events.drain(..) {
            self.receive(event);
        }
    }

    /// Takes a message, or puts it aside because the journal has no room for what it may change.
    fn receive(&mut self, message: Inbox) {
        let changes = match &message {
            Inbox::Client { request, .. } => request.changes(),
            Inbox::Register { .. } => true,
            _ => false,
        };
        if changes && self.is_behind {
            self.put_aside.push_back(message);
        } else {
            self.take(message);
        }
    }

    fn take_put_aside(&mut self) {
        for _ in 0..EVENTS_PER_TURN {
            let Some(message) = self.put_aside.pop_front() else { return };
            self.take(message);
        }
    }

    fn take(&mut self, message: Inbox) {
        match message {
            Inbox::Client { caller, request, answer } => {
                let reply = self.wait(Waiter::Client(answer));
                self.event(Event::Client { reply, caller, request });
            }
            Inbox::Register { peer_ip, request, answer } => {
                let reply = self.wait(Waiter::Register(answer));
                self.event(Event::Register { reply, peer_ip, request });
            }
            Inbox::Heartbeat { request, answer } => {
                let reply = self.wait(Waiter::Heartbeat(answer));
                self.event(Event::Heartbeat { reply, request });
            }
            Inbox::ReportOpened { stream, open, down } => {
                self.streams.insert(stream, down);
                self.event(Event::ReportOpened { stream, open });
            }
            // A stream that was closed from here may still have messages in the queue.
            Inbox::Report { stream, report } if self.streams.contains_key(&stream) => {
                self.event(Event::Report { stream, report });
            }
            Inbox::Report { .. } => {}
            Inbox::ReportClosed { stream } => {
                if self.streams.remove(&stream).is_some() {
                    self.event(Event::ReportClosed { stream });
                }
            }
            Inbox::Checkpoint { caller, answer } => self.image_asked(caller, answer),
            Inbox::CheckSuperuser { caller, answer } => {
                // The caller may have gone away.
                let _ = answer.send(self.check_superuser(caller));
            }
            Inbox::Stop => self.stopping = true,
        }
    }

    fn image_asked(&mut self, caller: Caller, answer: Answer<pb::CheckpointResponse>) {
        match self.check_superuser(caller) {
            Ok(()) => self.images_asked.push(answer),
            // The caller may have gone away.
            Err(error) => drop(answer.send(Err(error))),
        }
    }

    fn check_superuser(&self, caller: Caller) -> Result<()> {
        if self.core.is_superuser(&caller) {
            return Ok(());
        }
        let user = caller.user;
        let error = Error::new(ErrorCode::PermissionDenied, format!("user {user} is not a superuser"));
        Err(error.with_subject(user))
    }

    fn wait(&mut self, waiter: Waiter) -> ReplyTo {
        let reply = ReplyTo(self.next_reply);
        self.next_reply += 1;
        self.waiters.insert(reply, waiter);
        reply
    }

    fn event(&mut self, event: Event) {
        self.one_event(event);
        // Never inside another event: its edits would come between those of that one.
        while let Some(stream) = self.closed.pop() {
            self.one_event(Event::ReportClosed { stream });
        }
    }

    fn one_event(&mut self, event: Event) {
        let now = self.env.clock.now();
        let now = Now { mono_ms: now.mono_ms, wall_ms: now.wall_ms };
        let seed = self.env.entropy.next_u64();
        let mut commands = std::mem::take(&mut self.commands);
        self.core.on_event(now, seed, event, &mut commands);
        for command in commands.drain(..) {
            self.carry_out(command);
        }
        self.commands = commands;
    }

    fn carry_out(&mut self, command: Command) {
        let (depends_on, item) = match command {
            Command::Append { txid, edit } => return self.batch.push((txid, edit)),
            Command::Reply { to, depends_on, result } => (depends_on, Outgoing::Reply(to, result)),
            Command::Report { stream, depends_on, down } => (depends_on, Outgoing::Report(stream, down)),
            Command::CloseStream { stream, error } => return self.close_stream(stream, error.into()),
        };
        if let Some(item) = self.hold.offer(depends_on, item) {
            self.send(item);
        }
    }

    fn send(&mut self, item: Outgoing) {
        match item {
            Outgoing::Reply(to, result) => {
                if let Some(waiter) = self.waiters.remove(&to) {
                    waiter.answer(result);
                }
            }
            Outgoing::Report(stream, down) => {
                let Some(sender) = self.streams.get(&stream) else { return };
                if sender.messages.try_send(Ok(down)).is_err() {
                    // A node that does not read its credits would wait for ever: it opens the stream anew.
                    self.close_stream(stream, tonic::Status::unavailable("the node does not read its report stream"));
                }
            }
        }
    }

    fn close_stream(&mut self, stream: StreamId, status: tonic::Status) {
        if let Some(sender) = self.streams.remove(&stream) {
            // Full or gone: the end of the channel ends the stream all the same.
            let _ = sender.messages.try_send(Err(status));
            self.closed.push(stream);
        }
    }

    /// Lets go what became durable, and gives the journal the new edits.
    fn upkeep(&mut self, status: &mut watch::Receiver<JournalStatus>, journal: &Journal) -> Result<()> {
        let (durable, epoch) = {
            let status = status.borrow_and_update();
            match &status.failed {
                Some(error) => return Err(error.to_error()),
                None => (status.durable, status.epoch),
            }
        };
        if epoch > self.core.epoch() {
            // A directory was dropped. The new epoch is durable already; datanodes learn it with their next heartbeat, so
            // that they refuse whoever starts from the dropped directory.
            self.event(Event::EpochRaised { epoch });
        }
        if durable > self.hold.durable() {
            for item in self.hold.advance(durable) {
                self.send(item);
            }
            self.event(Event::Synced { txid: durable });
        }
        if !self.warned && self.core.future_replicas() > 0 {
            self.warned = true;
            tracing::error!(
                "datanodes hold blocks that are newer than this namenode's metadata: it was started from old metadata \
                 directories; those replicas are left alone"
            );
        }
        if !self.batch.is_empty() {
            self.batch = journal.try_append(std::mem::take(&mut self.batch)).map_err(|_| log_failure(status))?;
        }
        self.is_behind = !self.batch.is_empty();
        Ok(())
    }

    /// Answers what is in the queue, makes everything durable, lets go what waits for that, and ends.
    async fn finish(
        mut self,
        end: Result<()>,
        mut inbox: mpsc::Receiver<Inbox>,
        journal: Journal,
        imager: Imager,
    ) -> Result<()> {
        inbox.close();
        if end.is_ok() {
            while let Some(event) = self.put_aside.pop_front() {
                self.take(event);
            }
            while let Ok(event) = inbox.try_recv() {
                self.take(event);
            }
            let batch = std::mem::take(&mut self.batch);
            if !batch.is_empty() {
                // A failure shows in the status below.
                let _ = journal.append(batch).await;
            }
        }
        self.streams.clear();
        imager.close().await;
        let status = journal.close().await;
        for item in self.hold.advance(status.durable) {
            self.send(item);
        }
        match status.failed {
            Some(error) => Err(error.to_error()),
            None => end,
        }
    }
}

fn log_failure(status: &watch::Receiver<JournalStatus>) -> Error {
    match &status.borrow().failed {
        Some(error) => error.to_error(),
        None => Error::new(ErrorCode::Internal, "the edit log has stopped"),
    }
}
