//! Calls to the namenode: identified, repeated while that can help, with errors that name the address.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use cairn_common::Env;
use cairn_common::net::rpc;
use cairn_proto::pb::namenode_client::NamenodeClient;
use cairn_proto::{Error, ErrorCode, Result, pb};
use tonic::transport::Channel;

use super::settings::ClientSettings;

/// Largest answer that is accepted: a page of files with their locations.
const MAX_ANSWER_BYTES: usize = 64 << 20;
const FIRST_BACKOFF_MS: u64 = 50;
const LAST_BACKOFF_MS: u64 = 3_000;

/// How long a call may wait for the state of the namenode to change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Patience {
    /// Somebody waits at a prompt: safe mode is an answer soon.
    Caller,
    /// A file is half written: wait as long as the deadline allows.
    Writer,
    /// One attempt; the caller repeats.
    Once,
}

/// The one connection of a client to its namenode.
pub(crate) struct Namenode {
    env: Env,
    address: String,
    stub: NamenodeClient<Channel>,
    client_id: [u8; 16],
    calls: Mutex<Calls>,
    rpc_timeout: Duration,
    retry_deadline_ms: u64,
    safe_mode_wait_ms: u64,
}

#[derive(Default)]
struct Calls {
    last: u64,
    unanswered: BTreeSet<u64>,
}

/// A mutating call from its first sending to its answer; the namenode remembers it as long.
pub(crate) struct OpenCall<'a> {
    namenode: &'a Namenode,
    call_id: u64,
    lowest_unanswered: u64,
}

impl OpenCall<'_> {
    /// Goes with every repetition, so that the call is applied once.
    pub(crate) fn context(&self) -> Option<pb::CallContext> {
        Some(pb::CallContext {
            client_id: Bytes::copy_from_slice(&self.namenode.client_id),
            call_id: self.call_id,
            lowest_unanswered: self.lowest_unanswered,
            seen_txid: 0,
        })
    }
}

impl Drop for OpenCall<'_> {
    fn drop(&mut self) {
        lock(&self.namenode.calls).unanswered.remove(&self.call_id);
    }
}

/// The data under a mutex that no panic can leave half changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Namenode {
    /// Opens the connection; tries again for a moment while nothing listens. Also returns what the namenode says it is.
    pub(crate) async fn connect(
        env: Env,
        settings: &ClientSettings,
        hello: pb::Hello,
        client_id: [u8; 16],
    ) -> Result<(Self, pb::HelloReply)> {
        let address = settings.namenode.clone();
        let deadline = env.clock.mono_ms() + settings.first_connect_ms;
        let options = rpc::RpcOptions {
            connect_timeout: settings.connect_timeout(),
            call_timeout: Duration::from_millis(settings.rpc_timeout_ms),
        };
        let (channel, reply) = loop {
            let error = match rpc::channel(&env.net, &address, hello.clone(), options.clone()).await {
                Ok(opened) => break opened,
                Err(error) => error,
            };
            if error.code() != ErrorCode::Unreachable || env.clock.mono_ms() >= deadline {
                return Err(no_answer(&address, &error));
            }
            env.clock.sleep(Duration::from_millis(150)).await;
        };
        let namenode = Self {
            env,
            address,
            stub: NamenodeClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES),
            client_id,
            calls: Mutex::new(Calls::default()),
            rpc_timeout: Duration::from_millis(settings.rpc_timeout_ms),
            retry_deadline_ms: settings.retry_deadline_ms,
            safe_mode_wait_ms: settings.safe_mode_wait_ms,
        };
        Ok((namenode, reply))
    }

    /// Gives a mutating call its number.
    pub(crate) fn open_call(&self) -> OpenCall<'_> {
        let mut calls = lock(&self.calls);
        calls.last += 1;
        let call_id = calls.last;
        calls.unanswered.insert(call_id);
        let lowest_unanswered = calls.unanswered.first().copied().unwrap_or(call_id);
        OpenCall { namenode: self, call_id, lowest_unanswered }
    }

    /// Sends `request` with `send` until there is an answer, an error that stays, or the deadline.
    pub(crate) async fn call<Q, A, F, Fut>(&self, patience: Patience, request: Q, send: F) -> Result<A>
    where
        Q: Clone,
        F: Fn(NamenodeClient<Channel>, Q) -> Fut,
        Fut: Future<Output = std::result::Result<tonic::Response<A>, tonic::Status>>,
    {
        let started_ms = self.env.clock.mono_ms();
        let mut backoff_ms = FIRST_BACKOFF_MS;
        loop {
            let attempt = send(self.stub.clone(), request.clone());
            let error = match self.env.clock.timeout(self.rpc_timeout, attempt).await {
                Ok(Ok(answer)) => return Ok(answer.into_inner()),
                Ok(Err(status)) => rpc::error(status),
                Err(elapsed) => Error::new(ErrorCode::TimedOut, elapsed.to_string()),
            };
            let spent_ms = self.env.clock.mono_ms() - started_ms;
            let wait_ms = backoff_ms / 2 + self.env.entropy.below(backoff_ms / 2 + 1);
            if spent_ms + wait_ms > self.patience_ms(patience, &error) {
                return Err(self.named(error));
            }
            tracing::debug!(address = %self.address, %error, wait_ms, "namenode call is repeated");
            self.env.clock.sleep(Duration::from_millis(wait_ms)).await;
            backoff_ms = (backoff_ms * 2).min(LAST_BACKOFF_MS);
        }
    }

    fn patience_ms(&self, patience: Patience, error: &Error) -> u64 {
        if !error.is_retryable() {
            return 0;
        }
        match (patience, error.code()) {
            // A new call must ask again: under the same number the same answer would come.
            (Patience::Once, _) | (_, ErrorCode::NotReplicatedYet) => 0,
            (Patience::Caller, ErrorCode::SafeMode) => self.safe_mode_wait_ms,
            _ => self.retry_deadline_ms,
        }
    }

    fn named(&self, error: Error) -> Error {
        match error.code() {
            ErrorCode::Unreachable | ErrorCode::TimedOut => no_answer(&self.address, &error),
            // gRPC's "unimplemented" comes without words: the port of a datanode, most likely.
            ErrorCode::Unsupported if error.message().is_empty() => {
                let text = format!("{} speaks Cairn's protocol but is no namenode: check the port", self.address);
                Error::new(ErrorCode::Unsupported, text).with_subject(&self.address)
            }
            _ => error,
        }
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }
}

fn no_answer(address: &str, error: &Error) -> Error {
    match error.code() {
        ErrorCode::Unreachable | ErrorCode::TimedOut => {
            let text = format!("no namenode answers at {address}: {error}");
            Error::new(error.code(), text).with_subject(address)
        }
        _ => error.clone(),
    }
}
