//! Which call is which operation, what is answered twice, and what waits.
//!
//! A changing call goes through the retry cache. `AddBlock` and `Complete` may have to wait for replicas to be reported:
//! they are parked by file, tried again when a replica of that file is reported, and answered "not yet" at their deadline.

use std::collections::BTreeMap;

use cairn_proto::ids::TxId;
use cairn_proto::pb::{self, edit::Kind};
use cairn_proto::{Error, ErrorCode};

use super::directory::Deletion;
use super::event::{Caller, ClientRequest, ClientResponse, Command, ReplyTo, Response};
use super::retry::{self, CallKey, Known};
use super::writing::Progress;
use super::{Core, Turn};

/// Calls that wait at most, in all.
const MAX_PARKED: usize = 100_000;

struct ParkedCall {
    reply: ReplyTo,
    caller: Caller,
    request: ClientRequest,
    deadline_ms: u64,
}

/// Calls that wait for reports, by file.
#[derive(Default)]
pub struct Parked {
    by_file: BTreeMap<u64, Vec<ParkedCall>>,
    count: usize,
    /// Files of which a replica was reported in this event.
    woken: Vec<u64>,
}

impl Parked {
    /// A replica of this file was reported.
    pub fn wake(&mut self, file: u64) {
        if self.count > 0 && self.by_file.contains_key(&file) {
            self.woken.push(file);
        }
    }
}

enum Outcome {
    Done(Result<ClientResponse, Error>),
    /// Waits for replicas of this file.
    Wait(u64),
    /// A cursor will answer.
    Later,
    /// The tree with this root has to be looked at first.
    Check(u64),
}

/// A call that a cursor works for.
pub struct WaitingCall {
    key: Option<CallKey>,
    call: ParkedCall,
}

impl WaitingCall {
    /// Who calls.
    pub fn caller(&self) -> &Caller {
        &self.call.caller
    }
}

fn done<T: Into<ClientResponse>>(result: Result<T, Error>) -> Outcome {
    Outcome::Done(result.map(Into::into))
}

fn progress<T: Into<ClientResponse>>(file: u64, result: Result<Progress<T>, Error>) -> Outcome {
    match result {
        Ok(Progress::Done(response)) => Outcome::Done(Ok(response.into())),
        Ok(Progress::Wait) => Outcome::Wait(file),
        Err(error) => Outcome::Done(Err(error)),
    }
}

fn reply_to(turn: &mut Turn<'_>, to: ReplyTo, depends_on: TxId, result: Result<ClientResponse, Error>) {
    turn.commands.push(Command::Reply { to, depends_on, result: result.map(Response::Client) });
}

impl Core {
    pub(super) fn on_client(&mut self, turn: &mut Turn<'_>, reply: ReplyTo, caller: Caller, request: ClientRequest) {
        let mut key = None;
        if let Some(call) = retry::call_of(&request) {
            if call.client_id.len() > 64 {
                let error = Error::new(ErrorCode::InvalidArgument, "the client id is longer than 64 bytes");
                return reply_to(turn, reply, TxId(0), Err(error));
            }
            if !self.retry.belongs_to(&call.client_id, &caller.user) {
                let error = Error::new(ErrorCode::PermissionDenied, "the client id belongs to another user");
                return reply_to(turn, reply, TxId(0), Err(error));
            }
            let lowest_unanswered = call.lowest_unanswered;
            // A copy: the field is a slice of the whole request, which would stay in memory with it.
            let found: CallKey = (bytes::Bytes::copy_from_slice(&call.client_id), call.call_id);
            match self.retry.begin(&found, lowest_unanswered, &caller.user, reply) {
                Known::New => key = Some(found),
                Known::Waits => return,
                Known::Late => {
                    let text = format!("call {} was answered before: this is a late repetition", found.1);
                    return reply_to(turn, reply, TxId(0), Err(Error::new(ErrorCode::InvalidArgument, text)));
                }
                Known::Answered(answer, depends_on) => {
                    let damaged = |_| Error::new(ErrorCode::InvalidArgument, "this call id was used by another call");
                    return reply_to(turn, reply, depends_on, retry::decode(&request, &answer).map_err(damaged));
                }
            }
        }
        let deadline_ms = self.now_ms + self.settings.complete_wait_ms;
        self.attempt(turn, key, ParkedCall { reply, caller, request, deadline_ms });
    }

    fn run_call(
        &mut self,
        turn: &mut Turn<'_>,
        key: Option<&CallKey>,
        call: &ParkedCall,
        checked: Option<u64>,
    ) -> Outcome {
        self.unsynced.reset();
        turn.call = key.cloned();
        let outcome = self.run(turn, call.reply, &call.caller, &call.request, checked);
        turn.call = None;
        outcome
    }

    /// Runs a call; answers it, or parks it.
    fn attempt(&mut self, turn: &mut Turn<'_>, key: Option<CallKey>, call: ParkedCall) {
        let outcome = self.run_call(turn, key.as_ref(), &call, None);
        match outcome {
            Outcome::Done(result) => self.answer(turn, key, call.reply, result),
            Outcome::Later => {}
            Outcome::Check(root) => self.begin_check(turn, WaitingCall { key, call }, root),
            Outcome::Wait(_) if self.now_ms >= call.deadline_ms || self.parked.count >= MAX_PARKED => {
                let message = "Not all blocks have been reported by enough datanodes yet";
                self.answer(turn, key, call.reply, Err(Error::new(ErrorCode::NotReplicatedYet, message)));
            }
            Outcome::Wait(file) => {
                self.parked.by_file.entry(file).or_default().push(call);
                self.parked.count += 1;
            }
        }
    }

    fn answer(
        &mut self,
        turn: &mut Turn<'_>,
        key: Option<CallKey>,
        to: ReplyTo,
        result: Result<ClientResponse, Error>,
    ) {
        let depends_on = self.unsynced.depends_on();
        if let Some(key) = key {
            let kept = result.as_ref().ok().map(|response| (retry::encode(response), depends_on));
            for twin in self.retry.finish(&key, kept, self.now_ms) {
                reply_to(turn, twin, depends_on, result.clone());
            }
        }
        reply_to(turn, to, depends_on, result);
    }

    /// A call ends that a cursor worked for.
    pub(super) fn answer_waiting(
        &mut self,
        turn: &mut Turn<'_>,
        waiting: WaitingCall,
        result: Result<ClientResponse, Error>,
    ) {
        self.answer(turn, waiting.key, waiting.call.reply, result);
    }

    /// Runs a call for which the tree at `root` was looked at. Gives it back if it needs another tree by now.
    pub(super) fn run_checked(
        &mut self,
        turn: &mut Turn<'_>,
        waiting: WaitingCall,
        root: u64,
    ) -> Option<(WaitingCall, u64)> {
        match self.run_call(turn, waiting.key.as_ref(), &waiting.call, Some(root)) {
            Outcome::Done(result) => self.answer_waiting(turn, waiting, result),
            Outcome::Check(other) => return Some((waiting, other)),
            Outcome::Wait(_) | Outcome::Later => {}
        }
        None
    }

    /// Tries the parked calls of files of which a replica was reported in this event.
    pub(super) fn wake_parked(&mut self, turn: &mut Turn<'_>) {
        while let Some(file) = self.parked.woken.pop() {
            self.retry_parked(turn, file);
        }
    }

    fn retry_parked(&mut self, turn: &mut Turn<'_>, file: u64) {
        for call in self.parked.by_file.remove(&file).unwrap_or_default() {
            self.parked.count -= 1;
            let key = retry::call_of(&call.request).map(|context| (context.client_id.clone(), context.call_id));
            self.attempt(turn, key, call);
        }
    }

    /// Answers the parked calls whose time is over.
    pub(super) fn expire_parked(&mut self, turn: &mut Turn<'_>) {
        let late = |calls: &[ParkedCall]| calls.iter().any(|call| call.deadline_ms <= self.now_ms);
        let files: Vec<u64> =
            self.parked.by_file.iter().filter(|(_, calls)| late(calls)).map(|(file, _)| *file).collect();
        for file in files {
            self.retry_parked(turn, file);
        }
    }

    /// `checked`: the root of a tree that was looked at for this call.
    fn run(
        &mut self,
        turn: &mut Turn<'_>,
        reply: ReplyTo,
        caller: &Caller,
        request: &ClientRequest,
        checked: Option<u64>,
    ) -> Outcome {
        use ClientRequest as R;
        let who = self.who(caller);
        match request {
            R::GetStatus(r) => done(self.get_status(&who, r)),
            R::List(r) => done(self.list(turn, &who, r)),
            R::GetBlockLocations(r) => done(self.get_block_locations(turn, &who, r)),
            R::ContentSummary(r) => match self.begin_summary(turn, reply, caller, r) {
                Ok(()) => Outcome::Later,
                Err(error) => Outcome::Done(Err(error)),
            },
            R::CheckAccess(r) => done(self.may_access(&who, r)),
            R::GetServerDefaults(_) => done(Ok(self.server_defaults())),
            R::ClusterReport(_) => {
                self.unsynced.depend(self.last_txid);
                done(Ok(self.cluster_report()))
            }
            R::SafeMode(r) => done(self.safe_mode(&who, r)),
            R::ConfirmRestore(_) => done(self.confirm_restore(turn, &who)),
            R::ReportBadReplica(r) => done(self.report_bad_replica(r)),
            R::RenewLease(r) => done(Ok(self.renew_lease(&who, r))),
            R::SyncFile(r) => done(self.sync_file(&who, r)),
            R::Create(r) => done(self.create(turn, &who, r)),
            R::Append(r) => done(self.append(turn, &who, r)),
            R::Truncate(r) => done(self.truncate(turn, &who, r)),
            R::Concat(r) => done(self.concat(turn, &who, r)),
            R::RecoverLease(r) => done(self.recover_lease(turn, &who, r)),
            R::AddBlock(r) => progress(r.inode, self.add_block(turn, &who, r)),
            R::AbandonBlock(r) => done(self.abandon_block(turn, &who, r)),
            R::NewGeneration(r) => done(self.new_generation(turn, &who, r)),
            R::UpdatePipeline(r) => done(self.update_pipeline(turn, &who, r)),
            R::AddPipelineNode(r) => done(self.add_pipeline_node(turn, &who, r)),
            R::Complete(r) => progress(r.inode, self.complete(turn, &who, r)),
            R::Mkdirs(r) => done(self.mkdirs(turn, &who, r)),
            R::Rename(r) => done(self.rename(turn, &who, r)),
            R::Delete(r) => match self.delete(turn, &who, r, checked) {
                Ok(Deletion::Done(response)) => done(Ok(response)),
                Ok(Deletion::Check(root)) => Outcome::Check(root),
                Err(error) => Outcome::Done(Err(error)),
            },
            R::SetPermission(r) => done(self.set_permission(turn, &who, r)),
            R::SetOwner(r) => done(self.set_owner(turn, &who, r)),
            R::SetTimes(r) => done(self.set_times(turn, &who, r)),
            R::SetReplication(r) => done(self.set_replication(turn, &who, r)),
        }
    }

    /// Rebuilds the answer of the call that made a replayed edit.
    pub(super) fn remember_replayed(&mut self, txid: TxId, edit: &pb::Edit) {
        if edit.client_id.is_empty() {
            return;
        }
        let status = |id: u64| self.status(id, &self.tree.path_of(id));
        let answer = match &edit.kind {
            Some(Kind::Mkdir(e)) => retry::encode(&pb::MkdirsResponse { status: status(e.inode) }.into()),
            Some(Kind::Create(e)) => retry::encode(&pb::CreateResponse { status: status(e.inode) }.into()),
            Some(Kind::Append(e)) => {
                let blocks = self.tree.get(e.inode).map_or(0, |inode| inode.blocks().len() as u32);
                retry::encode(&pb::AppendResponse { status: status(e.inode), blocks }.into())
            }
            Some(Kind::Truncate(e)) => {
                retry::encode(&pb::TruncateResponse { done: e.cut_block == 0, status: status(e.inode) }.into())
            }
            Some(Kind::Concat(e)) => retry::encode(&pb::ConcatResponse { status: status(e.target) }.into()),
            Some(Kind::Close(e)) => retry::encode(&pb::CompleteResponse { status: status(e.inode) }.into()),
            Some(Kind::Delete(_)) => retry::encode(&pb::DeleteResponse { existed: true }.into()),
            Some(Kind::AllocateGeneration(e)) => retry::encode(
                &pb::NewGenerationResponse { generation: e.generation, token: bytes::Bytes::new() }.into(),
            ),
            // Its pipeline is not in the log; the call recognises its block by the index.
            Some(Kind::AddBlock(_)) | None => return,
            Some(_) => Vec::new(),
        };
        let client = bytes::Bytes::copy_from_slice(&edit.client_id);
        self.retry.finish(&(client, edit.call_id), Some((answer, txid)), self.now_ms);
        self.retry.expire(self.now_ms, self.settings.retry_cache_ms, self.settings.retry_cache_entries, usize::MAX);
    }
}
