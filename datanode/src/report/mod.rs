//! What this node and the namenode say to each other: registration, heartbeats, the report stream, orders.
//!
//! # Overview
//! [`Reporter::run`] registers (again and again until the namenode answers), then drives heartbeats and one report stream side by side. When either
//! ends, it registers again and reports everything again.
//!
//! # Consistency
//! A stream starts with a full report read from the live map; increments queue from its opening on. What became true while there was no stream is
//! in the full report, so nothing is lost.

pub mod commands;
pub mod outgoing;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cairn_common::net::rpc::{self, MAX_RPC_BYTES, RpcOptions};
use cairn_proto::pb::cluster_client::ClusterClient;
use cairn_proto::pb::{self, report_up::Report};
use cairn_proto::{Error, ErrorCode, PROTOCOL_VERSION, Result};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use self::commands::Commands;
use self::outgoing::Outgoing;
use crate::TaskLoad;
use crate::transfer::Transfer;

/// Reports that may wait inside the stream.
const STREAM_BUFFER: usize = 64;
/// First pause between two attempts to register.
const FIRST_RETRY: Duration = Duration::from_millis(100);
/// A call that takes longer has failed.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Speaks with the namenode; see the module.
pub struct Reporter {
    pub(crate) transfer: Arc<Transfer>,
    pub(crate) commands: Arc<Commands>,
    pub(crate) host: String,
    pub(crate) address: String,
    pub(crate) http_address: String,
    pub(crate) load: Option<Arc<dyn TaskLoad>>,
    /// Set once: why this node cannot serve at all.
    pub(crate) fatal: watch::Sender<Option<Error>>,
    /// Registrations so far.
    pub(crate) registered: watch::Sender<u64>,
    pub(crate) in_touch: AtomicBool,
    /// Heartbeats that were answered.
    pub(crate) beats: watch::Sender<u64>,
}

impl Reporter {
    /// Runs until the daemon ends, or until the namenode refuses this node for good.
    pub async fn run(self: Arc<Self>) {
        tokio::select! {
            biased;
            () = self.transfer.stopping() => {}
            () = self.sessions() => {}
        }
        self.transfer.store.map().end_stream();
    }

    async fn sessions(&self) {
        let longest = Duration::from_millis(self.transfer.settings.register_retry_max_ms);
        let namenode = &self.transfer.settings.namenode;
        let mut pause = FIRST_RETRY.min(longest);
        let mut last_said = String::new();
        loop {
            let error = match self.register().await {
                Ok((client, answer)) => {
                    tracing::info!("registered with {namenode} (registration {})", answer.registration);
                    self.registered.send_modify(|count| *count += 1);
                    self.in_touch.store(true, Ordering::Relaxed);
                    pause = FIRST_RETRY.min(longest);
                    last_said.clear();
                    self.session(client, &answer).await
                }
                Err(error) => error,
            };
            self.in_touch.store(false, Ordering::Relaxed);
            self.transfer.store.map().end_stream();
            if *self.registered.borrow() == 0 && refused_for_good(error.code()) {
                tracing::error!("{namenode} refuses this datanode: {error}");
                self.fatal.send_replace(Some(error));
                return;
            }
            // One line per thing that an operator may act on, not one per attempt.
            if error.message() != last_said {
                tracing::warn!("not in touch with the namenode at {namenode}: {error}; trying again");
                error.message().clone_into(&mut last_said);
            }
            let jitter = self.transfer.env.entropy.below(pause.as_millis().max(1) as u64);
            self.transfer.env.clock.sleep(pause / 2 + Duration::from_millis(jitter)).await;
            pause = (pause * 2).min(longest);
        }
    }

    async fn register(&self) -> Result<(ClusterClient<Channel>, pb::RegisterResponse)> {
        let transfer = &self.transfer;
        let options = RpcOptions { connect_timeout: transfer.settings.connect_timeout(), call_timeout: CALL_TIMEOUT };
        let hello = transfer.hello();
        let (channel, _) = rpc::channel(&transfer.env.net, &transfer.settings.namenode, hello, options).await?;
        let mut client = ClusterClient::new(channel)
            .max_decoding_message_size(MAX_RPC_BYTES)
            .max_encoding_message_size(MAX_RPC_BYTES);
        let identity = transfer.store.identity();
        let request = pb::RegisterRequest {
            node_id: identity.node_id,
            host: self.host.clone(),
            address: self.address.clone(),
            http_address: self.http_address.clone(),
            rack: transfer.settings.rack.clone(),
            cluster_id: identity.cluster_id,
            pool_id: identity.pool_id,
            protocol_version: u32::from(PROTOCOL_VERSION),
            software: env!("CARGO_PKG_VERSION").into(),
            epoch: identity.epoch,
            storages: transfer.store.storages().await,
            task_slots: self.load.as_ref().map_or(0, |load| load.slots()),
        };
        let answer = client.register(request).await.map_err(rpc::error)?.into_inner();
        transfer.store.join_cluster(&answer.cluster_id, &answer.pool_id, answer.epoch).await?;
        if answer.restore_unconfirmed {
            // Before anything is reported: the restored namespace may know what another future had put away.
            transfer.store.bring_back().await;
        }
        Ok((client, answer))
    }

    /// Heartbeats and reports until either ends; why.
    async fn session(&self, client: ClusterClient<Channel>, answer: &pb::RegisterResponse) -> Error {
        let outcome = tokio::select! {
            outcome = self.report(client.clone(), answer.registration) => outcome,
            outcome = self.beat(client, answer) => outcome,
        };
        outcome.err().unwrap_or_else(|| Error::new(ErrorCode::Unreachable, "the namenode ended the report stream"))
    }

    async fn report(&self, mut client: ClusterClient<Channel>, registration: u64) -> Result<()> {
        let map = self.transfer.store.map();
        let node_id = self.transfer.store.identity().node_id;
        let (up, stream) = mpsc::channel(STREAM_BUFFER);
        let send = async |report: Report| {
            let message = pb::ReportUp { report: Some(report) };
            up.send(message).await.map_err(|_| Error::new(ErrorCode::Unreachable, "the report stream broke"))
        };
        send(Report::Open(pb::ReportOpen { node_id, registration })).await?;
        map.begin_stream();
        let mut down = client.reports(ReceiverStream::new(stream)).await.map_err(rpc::error)?.into_inner();
        let volumes = self.transfer.store.volumes().iter().map(|volume| volume.storage_id().to_owned()).collect();
        let mut outgoing = Outgoing::new(volumes);
        loop {
            if let Some(batch) = outgoing.take(map) {
                for report in batch.reports {
                    send(report).await?;
                }
                if let Some(up_to) = batch.up_to {
                    map.mark_sent(up_to);
                }
                continue;
            }
            tokio::select! {
                message = down.message() => match message.map_err(rpc::error)? {
                    Some(message) => outgoing.grant(message.range_credits),
                    None => return Ok(()),
                },
                () = map.wait_change() => {}
                () = self.commands.full_report_wanted() => outgoing.restart(),
            }
        }
    }

    async fn beat(&self, mut client: ClusterClient<Channel>, answer: &pb::RegisterResponse) -> Result<()> {
        let store = &self.transfer.store;
        let interval = Duration::from_millis(answer.heartbeat_interval_ms.clamp(20, 600_000));
        let node_id = store.identity().node_id;
        loop {
            let started_ms = self.transfer.env.clock.mono_ms();
            let request = pb::HeartbeatRequest {
                node_id: node_id.clone(),
                registration: answer.registration,
                storages: store.storages().await,
                active_transfers: self.transfer.metrics.active.load(Ordering::Relaxed) as u32,
                task_slots: self.load.as_ref().map_or(0, |load| load.slots()),
                tasks_running: self.load.as_ref().map_or(0, |load| load.running()),
                epoch: store.identity().epoch,
            };
            match self.transfer.env.clock.timeout(CALL_TIMEOUT, client.heartbeat(request)).await {
                Ok(Ok(response)) => {
                    self.in_touch.store(true, Ordering::Relaxed);
                    self.beats.send_modify(|count| *count += 1);
                    let response = response.into_inner();
                    store.join_cluster(&answer.cluster_id, &answer.pool_id, response.epoch).await?;
                    for command in response.commands {
                        self.commands.take(command, response.epoch);
                    }
                }
                Ok(Err(status)) => {
                    let error = rpc::error(status);
                    if !error.is_retryable() {
                        return Err(error);
                    }
                    self.in_touch.store(false, Ordering::Relaxed);
                    tracing::debug!("heartbeat: {error}");
                }
                Err(_) => {
                    self.in_touch.store(false, Ordering::Relaxed);
                    tracing::debug!("heartbeat: no answer within {CALL_TIMEOUT:?}");
                }
            }
            let spent = Duration::from_millis(self.transfer.env.clock.mono_ms().saturating_sub(started_ms));
            self.transfer.env.clock.sleep(interval.saturating_sub(spent)).await;
        }
    }
}

/// A node that was never taken does not become right by waiting.
fn refused_for_good(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::WrongCluster
            | ErrorCode::UnsupportedVersion
            | ErrorCode::StaleEpoch
            | ErrorCode::InvalidArgument
            | ErrorCode::PermissionDenied
    )
}
