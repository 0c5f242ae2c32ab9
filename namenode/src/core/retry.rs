//! Answers of changing calls, kept so that a repeated call is answered, not applied again.
//!
//! # Overview
//! Key: (client id, call id). A call that still waits is kept too: its duplicate waits with it. Errors are not kept: the
//! call changed nothing, so it may run again. A client tells its lowest unanswered call id with each call, which frees
//! everything below; a repetition of such a call that was long on its way is refused. What nobody frees goes by age or
//! when the cache is full, oldest first. A client id belongs to the user who used it first; nobody else gets its answers.
//!
//! # Restart
//! Edits carry client id and call id, so replay brings answers back; images carry the newest ones.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use bytes::Bytes;
use cairn_proto::ids::TxId;
use cairn_proto::pb;
use prost::Message as _;

use super::codec::{FixedMap, put, put_bytes};
use super::event::{ClientRequest, ClientResponse, ReplyTo};

/// Client id and call id.
pub type CallKey = (Bytes, u64);

/// What is known of a call.
pub enum Known {
    /// Nothing: run it.
    New,
    /// It runs; the caller was noted and will be answered with the first one.
    Waits,
    /// It was answered with this, encoded.
    Answered(Vec<u8>, TxId),
    /// Its answer arrived and was let go of: a duplicate that was long on its way. Nobody waits for it.
    Late,
}

enum Entry {
    Running(Vec<ReplyTo>),
    Done { answer: Vec<u8>, depends_on: TxId },
}

#[derive(Default)]
struct Client {
    /// `None`: only known from the log, which names no users.
    user: Option<Box<str>>,
    calls: BTreeMap<u64, Entry>,
    /// It has the answers of all calls below.
    answered_below: u64,
}

/// See the module.
#[derive(Default)]
pub struct RetryCache {
    clients: FixedMap<Bytes, Client>,
    /// Answers in order of time, for age and bound; may name entries that are gone.
    order: VecDeque<(u64, Bytes, u64)>,
    entries: usize,
    /// The part of `order` that an image under way has still to take.
    to_copy: Range<usize>,
}

impl RetryCache {
    /// Number of calls that are kept.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.entries
    }

    /// The counter is that of the map, and no client is kept without a call.
    #[cfg(test)]
    pub fn check_sums(&self) {
        assert_eq!(self.entries, self.clients.values().map(|client| client.calls.len()).sum::<usize>());
        assert!(self.clients.values().all(|client| !client.calls.is_empty()));
    }

    /// Whether this user may use this client id.
    pub fn belongs_to(&self, client: &[u8], user: &str) -> bool {
        self.clients.get(client).and_then(|known| known.user.as_deref()).is_none_or(|owner| owner == user)
    }

    /// Looks a call up; a new one is noted as running. The client has all answers below `lowest_unanswered`: they are let go of.
    pub fn begin(&mut self, key: &CallKey, lowest_unanswered: u64, user: &str, reply: ReplyTo) -> Known {
        let client = self.clients.entry(key.0.clone()).or_default();
        client.user.get_or_insert_with(|| user.into());
        client.answered_below = lowest_unanswered.max(client.answered_below);
        let calls = &mut client.calls;
        while let Some(first) = calls.first_entry() {
            if *first.key() >= lowest_unanswered || matches!(first.get(), Entry::Running(_)) {
                break;
            }
            first.remove();
            self.entries -= 1;
        }
        match calls.get_mut(&key.1) {
            None if key.1 < client.answered_below => {
                if calls.is_empty() {
                    self.clients.remove(&key.0);
                }
                Known::Late
            }
            None => {
                calls.insert(key.1, Entry::Running(Vec::new()));
                self.entries += 1;
                Known::New
            }
            Some(Entry::Running(waiting)) => {
                waiting.push(reply);
                Known::Waits
            }
            Some(Entry::Done { answer, depends_on }) => Known::Answered(answer.clone(), *depends_on),
        }
    }

    /// A call has its answer (`None`: it failed). Returns the duplicates that waited.
    pub fn finish(&mut self, key: &CallKey, answer: Option<(Vec<u8>, TxId)>, now_ms: u64) -> Vec<ReplyTo> {
        let calls = &mut self.clients.entry(key.0.clone()).or_default().calls;
        let waiting = match calls.remove(&key.1) {
            Some(Entry::Running(waiting)) => waiting,
            Some(Entry::Done { .. }) => Vec::new(),
            None => {
                self.entries += 1;
                Vec::new()
            }
        };
        match answer {
            Some((answer, depends_on)) => {
                calls.insert(key.1, Entry::Done { answer, depends_on });
                self.order.push_back((now_ms, key.0.clone(), key.1));
            }
            None => {
                self.entries -= 1;
                if calls.is_empty() {
                    self.clients.remove(&key.0);
                }
            }
        }
        waiting
    }

    /// Drops what is older than `age_ms` or beyond `bound`, at most `budget` of it. `true`: there is more.
    pub fn expire(&mut self, now_ms: u64, age_ms: u64, bound: usize, budget: usize) -> bool {
        for _ in 0..budget {
            let Some((at, client, call)) = self.order.front() else { return false };
            let gone = match self.clients.get(client) {
                Some(client) => !matches!(client.calls.get(call), Some(Entry::Done { .. })),
                None => true,
            };
            if !gone && at + age_ms > now_ms && self.entries <= bound {
                // Released entries leave their names here: tidy up when those are the most.
                if self.order.len() > 2 * self.entries + 1_024 && self.to_copy.is_empty() {
                    self.tidy();
                }
                return false;
            }
            if !gone && let Some(Client { calls, .. }) = self.clients.get_mut(client) {
                calls.remove(call);
                self.entries -= 1;
                if calls.is_empty() {
                    self.clients.remove(client);
                }
            }
            self.order.pop_front();
            self.to_copy = self.to_copy.start.saturating_sub(1)..self.to_copy.end.saturating_sub(1);
        }
        true
    }

    /// All answers are as old as now: the clock of the namenode's earlier life means nothing.
    pub fn restamp(&mut self, now_ms: u64) {
        self.order.iter_mut().for_each(|(at, _, _)| *at = now_ms);
    }

    fn tidy(&mut self) {
        let clients = &self.clients;
        self.order
            .retain(|(_, client, call)| clients.get(client).is_some_and(|client| client.calls.contains_key(call)));
    }

    /// Begins a copy of the answers that are known now. One that its client lets go meanwhile may be left out: nobody
    /// will ask for it.
    pub fn begin_copy(&mut self) {
        self.to_copy = 0..self.order.len();
    }

    /// Gives a copy up.
    pub fn abort_copy(&mut self) {
        self.to_copy = 0..0;
    }

    /// At most `most` answers more, oldest first: how many, and client, call and answer of each, encoded. `None`: all are
    /// copied.
    pub fn copy_some(&mut self, most: usize) -> Option<(usize, Vec<u8>)> {
        let (mut count, mut out) = (0, Vec::new());
        let end = self.to_copy.end.min(self.to_copy.start + most);
        if self.to_copy.is_empty() {
            return None;
        }
        for (_, client, call) in self.order.range(self.to_copy.start..end) {
            let entry = self.clients.get(client).and_then(|client| client.calls.get(call));
            if let Some(Entry::Done { answer, .. }) = entry {
                put_bytes(&mut out, client);
                put(&mut out, *call);
                put_bytes(&mut out, answer);
                count += 1;
            }
        }
        self.to_copy.start = end;
        Some((count, out))
    }
}

/// The call context of a changing call that is kept.
pub fn call_of(request: &ClientRequest) -> Option<&pb::CallContext> {
    use ClientRequest as R;
    let call = match request {
        R::Create(r) => &r.call,
        R::Append(r) => &r.call,
        R::Truncate(r) => &r.call,
        R::Concat(r) => &r.call,
        R::AddBlock(r) => &r.call,
        R::AbandonBlock(r) => &r.call,
        R::NewGeneration(r) => &r.call,
        R::UpdatePipeline(r) => &r.call,
        R::Complete(r) => &r.call,
        R::Mkdirs(r) => &r.call,
        R::Rename(r) => &r.call,
        R::Delete(r) => &r.call,
        R::SetPermission(r) => &r.call,
        R::SetOwner(r) => &r.call,
        R::SetTimes(r) => &r.call,
        R::SetReplication(r) => &r.call,
        R::GetServerDefaults(_)
        | R::AddPipelineNode(_)
        | R::RenewLease(_)
        | R::SyncFile(_)
        | R::RecoverLease(_)
        | R::GetStatus(_)
        | R::List(_)
        | R::GetBlockLocations(_)
        | R::ContentSummary(_)
        | R::ReportBadReplica(_)
        | R::CheckAccess(_)
        | R::ClusterReport(_)
        | R::SafeMode(_)
        | R::ConfirmRestore(_) => &None,
    };
    call.as_ref().filter(|call| !call.client_id.is_empty())
}

/// The answer as it is kept.
pub fn encode(response: &ClientResponse) -> Vec<u8> {
    use ClientResponse as R;
    match response {
        R::Create(r) => r.encode_to_vec(),
        R::Append(r) => r.encode_to_vec(),
        R::Truncate(r) => r.encode_to_vec(),
        R::Concat(r) => r.encode_to_vec(),
        R::AddBlock(r) => r.encode_to_vec(),
        R::NewGeneration(r) => r.encode_to_vec(),
        R::Complete(r) => r.encode_to_vec(),
        R::Mkdirs(r) => r.encode_to_vec(),
        R::Delete(r) => r.encode_to_vec(),
        _ => Vec::new(),
    }
}

/// The kept answer for a repeated request; an error if that is another call under the same number.
pub fn decode(request: &ClientRequest, answer: &[u8]) -> Result<ClientResponse, prost::DecodeError> {
    use ClientRequest as R;
    Ok(match request {
        R::Create(_) => pb::CreateResponse::decode(answer)?.into(),
        R::Append(_) => pb::AppendResponse::decode(answer)?.into(),
        R::Truncate(_) => pb::TruncateResponse::decode(answer)?.into(),
        R::Concat(_) => pb::ConcatResponse::decode(answer)?.into(),
        R::AddBlock(_) => pb::AddBlockResponse::decode(answer)?.into(),
        R::NewGeneration(_) => pb::NewGenerationResponse::decode(answer)?.into(),
        R::Complete(_) => pb::CompleteResponse::decode(answer)?.into(),
        R::Mkdirs(_) => pb::MkdirsResponse::decode(answer)?.into(),
        R::Delete(_) => pb::DeleteResponse::decode(answer)?.into(),
        R::AbandonBlock(_) => pb::AbandonBlockResponse {}.into(),
        R::UpdatePipeline(_) => pb::UpdatePipelineResponse {}.into(),
        R::Rename(_) => pb::RenameResponse {}.into(),
        R::SetPermission(_) => pb::SetPermissionResponse {}.into(),
        R::SetOwner(_) => pb::SetOwnerResponse {}.into(),
        R::SetTimes(_) => pb::SetTimesResponse {}.into(),
        _ => pb::SetReplicationResponse {}.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::codec::Reader;

    #[test]
    fn duplicates_wait_then_get_the_first_answer() {
        let mut cache = RetryCache::default();
        let key = (Bytes::from(vec![1; 16]), 5);
        assert!(matches!(cache.begin(&key, 5, "ann", ReplyTo(1)), Known::New));
        assert!(matches!(cache.begin(&key, 5, "ann", ReplyTo(2)), Known::Waits));
        assert_eq!(cache.finish(&key, Some((vec![9], TxId(3))), 0), [ReplyTo(2)]);
        assert!(matches!(cache.begin(&key, 5, "ann", ReplyTo(3)), Known::Answered(answer, TxId(3)) if answer == [9]));
        assert!(cache.belongs_to(&key.0, "ann") && !cache.belongs_to(&key.0, "bob"));
        assert!(cache.finish(&key, None, 0).is_empty());
        assert!(matches!(cache.begin(&key, 5, "ann", ReplyTo(5)), Known::New));
    }

    #[test]
    fn what_was_let_go_of_is_not_run_again() {
        let mut cache = RetryCache::default();
        let key = |call| (Bytes::from(vec![1; 16]), call);
        for call in [5, 7] {
            assert!(matches!(cache.begin(&key(call), 5, "ann", ReplyTo(call)), Known::New));
            cache.finish(&key(call), Some((vec![9], TxId(3))), 0);
        }
        assert!(matches!(cache.begin(&key(6), 6, "ann", ReplyTo(6)), Known::New), "it was opened before 7");
        assert_eq!(cache.len(), 2);
        assert!(matches!(cache.begin(&key(5), 5, "ann", ReplyTo(8)), Known::Late));
        assert!(matches!(cache.begin(&key(7), 5, "ann", ReplyTo(9)), Known::Answered(..)));
        assert!(matches!(cache.begin(&key(4), 9, "bob", ReplyTo(1)), Known::Late));
        cache.finish(&key(6), None, 0);
        cache.check_sums();
    }

    #[test]
    fn age_and_bound_drop_the_oldest() {
        let mut cache = RetryCache::default();
        for call in 0..10 {
            cache.finish(&(Bytes::from(vec![1]), call), Some((Vec::new(), TxId(0))), call);
        }
        assert!(cache.expire(10, 100, 6, 3), "no more than the budget at a time");
        assert_eq!(cache.len(), 7);
        assert!(!cache.expire(10, 100, 6, 3));
        cache.begin_copy();
        let mut calls = Vec::new();
        while let Some((count, page)) = cache.copy_some(2) {
            let mut reader = Reader::new(&page);
            for _ in 0..count {
                calls.push((reader.bytes().unwrap(), reader.number().unwrap(), reader.bytes().unwrap()).1);
            }
            // What is dropped or comes meanwhile moves nothing.
            cache.finish(&(Bytes::from(vec![1]), 50 + calls.len() as u64), Some((Vec::new(), TxId(0))), 200);
            cache.expire(106, 100, 100, 1);
        }
        assert_eq!(calls, [4, 5, 6, 7, 8, 9]);
        cache.expire(106, 100, 100, 100);
        assert_eq!(cache.len(), 3 + 3);
    }
}
