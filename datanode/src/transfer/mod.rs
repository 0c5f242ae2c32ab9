//! The data plane: writes in pipelines, reads, copies to other nodes.
//!
//! # Overview
//! [`Transfer`] is what all operations share. [`serve_data`] carries out the operations of one connection one after the other. The contract of the
//! wire is in `cairn_proto::dataplane`.
//!
//! # Limits
//! At most `max_transfers` operations at once; each holds a bounded number of bytes, and all writers together too ([`budget`]). All waits on peers end by a timeout.

pub mod ack;
pub mod budget;
pub mod copy;
pub mod cut;
pub mod disk;
pub mod merge;
#[cfg(test)]
mod orders_tests;
pub mod partial;
#[cfg(test)]
mod partial_tests;
pub mod read;
pub mod recover;
#[cfg(test)]
mod recover_tests;
#[cfg(test)]
mod tests;
pub mod upstream;
pub mod wire;
pub mod write;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cairn_common::Env;
use cairn_common::net::{self, Conn};
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::sync::{Semaphore, watch};

use crate::MapOutputs;
use crate::hadoop::framing::SealerPool;
use crate::scrub::Scrub;
use crate::settings::DatanodeSettings;
use crate::store::BlockStore;

/// Counters for `/metrics`.
#[derive(Default, Debug)]
pub struct Metrics {
    /// Operations under way.
    pub active: AtomicU64,
    /// Bytes of frames received.
    pub bytes_received: AtomicU64,
    /// Bytes sent to readers.
    pub bytes_sent: AtomicU64,
    /// Writes asked for.
    pub writes: AtomicU64,
    /// Writes that broke.
    pub writes_failed: AtomicU64,
    /// Reads asked for.
    pub reads: AtomicU64,
    /// Copies sent to other nodes.
    pub copies: AtomicU64,
    /// First parts of blocks sent to nodes that join a pipeline.
    pub partial_copies: AtomicU64,
    /// Times that a writer waited because all writers together held too much memory.
    pub memory_waits: AtomicU64,
    /// Times that the next node of a pipeline was far behind this one for long, by its own fault.
    pub slow_next: AtomicU64,
    /// Next nodes that were given up because they said nothing.
    pub stalled_next: AtomicU64,
    /// Replicas deleted by order of the namenode.
    pub deleted: AtomicU64,
    /// Operations refused because too many were under way.
    pub refused: AtomicU64,
}

/// What all operations share.
pub struct Transfer {
    pub(crate) env: Env,
    pub(crate) settings: Arc<DatanodeSettings>,
    pub(crate) store: Arc<BlockStore>,
    pub(crate) metrics: Metrics,
    pub(crate) user: String,
    map_outputs: Option<Arc<dyn MapOutputs>>,
    pub(crate) slots: Semaphore,
    /// Room for bytes on their way to the disk, of all writers together.
    pub(crate) memory: budget::NodeBudget,
    /// Whole-replica checks disturb everybody, so few run at once.
    checks: Semaphore,
    stop: watch::Sender<bool>,
    pub(crate) scrub: Scrub,
    /// Compressors for frames that this node makes of Hadoop clients' packets.
    pub(crate) sealers: SealerPool,
}

impl Transfer {
    /// Over a store.
    pub fn new(
        env: &Env,
        settings: &Arc<DatanodeSettings>,
        store: &Arc<BlockStore>,
        map_outputs: Option<Arc<dyn MapOutputs>>,
        outcomes: Option<Arc<dyn cairn_common::kv::KeyValue>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            env: env.clone(),
            settings: Arc::clone(settings),
            store: Arc::clone(store),
            metrics: Metrics::default(),
            user: cairn_common::process::user_name(),
            map_outputs,
            slots: Semaphore::new(settings.max_transfers),
            memory: budget::NodeBudget::new(settings.writer_memory_bytes),
            checks: Semaphore::new(2),
            stop: watch::channel(false).0,
            scrub: Scrub::new(env, outcomes, store.volumes().len()),
            sealers: SealerPool::default(),
        })
    }

    /// Ends all operations in an orderly way.
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// Holds `true` when the daemon ends.
    pub(crate) fn stop_signal(&self) -> watch::Receiver<bool> {
        self.stop.subscribe()
    }

    /// Resolves when the daemon ends.
    pub async fn stopping(&self) {
        let mut stop = self.stop.subscribe();
        let _ = stop.wait_for(|stop| *stop).await;
    }

    /// What this node says of itself when it dials another.
    pub fn hello(&self) -> pb::Hello {
        let identity = self.store.identity();
        pb::Hello {
            user: self.user.clone(),
            cluster_id: identity.cluster_id,
            role: "datanode".into(),
            peer_id: identity.node_id,
            software: env!("CARGO_PKG_VERSION").into(),
            epoch: identity.epoch,
            token: Default::default(),
        }
    }

    /// Checks that a request names a block of our pool.
    pub fn check_block(&self, block: Option<&pb::Block>) -> Result<(BlockId, Generation)> {
        let Some(block) = block else {
            return Err(Error::new(ErrorCode::InvalidArgument, "the request names no block"));
        };
        let pool = self.store.map().pool();
        if block.pool != pool {
            let text = format!("block {} is of pool {:?}, this datanode serves {pool:?}", block.id, block.pool);
            return Err(Error::new(ErrorCode::WrongCluster, text).with_subject(block.id.to_string()));
        }
        if block.id <= 0 {
            let text = format!("{} is no block id: they are positive", block.id);
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
        Ok((BlockId(block.id), Generation(block.generation)))
    }

    /// Verifies a replica and notes the outcome.
    pub async fn verify(&self, block: BlockId, generation: Generation) -> Result<(u64, u64)> {
        // The semaphore is never closed; were it, verifying at once is still right.
        let _permit = self.checks.acquire().await.ok();
        let outcome = self.store.verify(block, generation).await;
        self.scrub.note(block, &outcome).await;
        outcome
    }
}

/// Counts an operation while it lives.
pub(crate) struct Active<'a>(&'a AtomicU64);

impl<'a> Active<'a> {
    pub(crate) fn new(count: &'a AtomicU64) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Carries out the operations of one connection until it ends.
pub async fn serve_data(transfer: Arc<Transfer>, mut conn: Conn) {
    let who = conn.peer_addr().to_string();
    loop {
        let idle = transfer.settings.idle_timeout();
        let read = transfer.env.clock.timeout(idle, net::read_message::<pb::DataRequest>(&mut conn, &who));
        let request = tokio::select! {
            biased;
            () = transfer.stopping() => return,
            request = read => match request {
                Ok(Ok(request)) => request,
                Ok(Err(error)) if error.code() == ErrorCode::Corrupt => {
                    tracing::warn!("{error}");
                    return;
                }
                Ok(Err(error)) => {
                    tracing::debug!("{who}: {error}");
                    return;
                }
                Err(_) => return,
            },
        };
        let Some(op) = request.op else {
            tracing::debug!("{who} sent an operation that this version does not know");
            return;
        };
        let Ok(slot) = transfer.slots.try_acquire() else {
            transfer.metrics.refused.fetch_add(1, Ordering::Relaxed);
            let text = format!("{} transfers are under way, no more are taken now", transfer.settings.max_transfers);
            if read::refuse(&mut conn, &op, &Error::new(ErrorCode::Busy, text)).await.is_err() {
                return;
            }
            continue;
        };
        let _active = Active::new(&transfer.metrics.active);
        let done = match op {
            pb::data_request::Op::Write(request) => {
                transfer.metrics.writes.fetch_add(1, Ordering::Relaxed);
                write::serve(&transfer, conn, request).await;
                return;
            }
            pb::data_request::Op::Transfer(request) => partial::serve(&transfer, &mut conn, request).await,
            pb::data_request::Op::Read(request) => read::serve_read(&transfer, &mut conn, request).await,
            pb::data_request::Op::Info(request) => read::serve_info(&transfer, &mut conn, request).await,
            pb::data_request::Op::Verify(request) => {
                // Few run at once: those that wait for their turn must not keep copies out.
                drop(slot);
                read::serve_verify(&transfer, &mut conn, request).await
            }
            pb::data_request::Op::Truncate(request) => cut::serve_truncate(&transfer, &mut conn, request).await,
            pb::data_request::Op::MapOutput(request) => read::serve_map_output(&transfer, &mut conn, request).await,
        };
        if let Err(error) = done {
            tracing::debug!("{who}: {error}");
            return;
        }
    }
}
