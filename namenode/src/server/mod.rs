//! The namenode as a process: start-up, the owner, the services, the end.
//!
//! # Overview
//! * [`Namenode::start`]: locks the directories, loads or formats, starts the threads, opens the ports
//! * [`owner`]: the one owner of the core; [`hold`]: what may not leave yet; [`checkpoint`]: when images are written
//! * [`service`]: gRPC in front of the owner; [`accept`]: the RPC port
//!
//! # Crash
//! Nothing here is needed after a crash: log and images are (see [`crate::journal`], [`crate::image`]).
//!
//! # Cancellation
//! Dropping a [`Running`] without [`Running::shutdown`] is like a crash, except that the threads go on until the process
//! ends.

mod accept;
mod checkpoint;
mod groups;
mod handle;
mod hold;
mod load;
mod owner;
mod service;

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod restore_tests;
#[cfg(test)]
mod stall_tests;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use cairn_common::Env;
use cairn_common::net::hadoop::Limits;
use cairn_common::net::http::Guard;
use cairn_common::net::rpc::MAX_RPC_BYTES;
use cairn_common::process;
use cairn_common::work::OwnerHandle;
use cairn_proto::pb::cluster_server::ClusterServer;
use cairn_proto::pb::namenode_server::NamenodeServer;
use cairn_proto::{Error, ErrorCode, Result};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use crate::backup::Archiver;
use crate::hadoop::ClientProtocol;
use crate::http;
use crate::image::Imager;
use crate::journal::{Journal, LogSizes};
use crate::settings::NamenodeSettings;

pub use groups::Groups;
pub use handle::OwnerRef;

/// Connections that wait for the gRPC server to take them.
const ADMITTED: usize = 128;
/// Calls that are under way get this long at an orderly end.
const DRAIN: Duration = Duration::from_secs(2);

/// A namenode.
pub struct Namenode;

/// A namenode that serves.
pub struct Running {
    /// Where RPC is served.
    pub rpc_addr: SocketAddr,
    /// Where HTTP is served, if it is.
    pub http_addr: Option<SocketAddr>,
    /// The cluster.
    pub cluster_id: String,
    /// Its block pool.
    pub pool_id: String,
    owner: OwnerRef,
    owner_thread: OwnerHandle,
    ended: watch::Receiver<Option<Result<()>>>,
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
    archiver: Option<Archiver>,
    env: Env,
}

impl Namenode {
    /// Starts a namenode; it serves when this returns. An empty directory is formatted.
    pub async fn start(env: Env, settings: NamenodeSettings) -> Result<Running> {
        settings.validate()?;
        let started_ms = env.clock.mono_ms();
        // Before the directories are touched: a port that is taken must not cost a load.
        let listener = env.net.bind(&settings.listen).await?;
        let http_listener = match &settings.http {
            Some(addr) => Some(env.net.bind(addr).await?),
            None => None,
        };
        let mut loaded = load_off_thread(&env, &settings).await?;
        let facts = loaded.facts.clone();
        tracing::info!(
            cluster_id = %facts.cluster_id, epoch = %facts.epoch, last_txid = %loaded.core.last_txid(),
            image = %loaded.image, replayed = loaded.replayed, formatted = loaded.is_new,
            elapsed_ms = env.clock.mono_ms() - started_ms, "namespace loaded"
        );
        let threads = |error: std::io::Error| Error::io("cannot start a thread", &error);
        let journal = Journal::start(&env, loaded.writer, settings.journal_queue).map_err(threads)?;
        let imager = Imager::start(&env).map_err(threads)?;
        let (queue, inbox) = mpsc::channel(settings.event_queue);
        let owner = OwnerRef::new(queue);
        let journal_status = journal.status();
        let archiver = match &settings.archive {
            None => None,
            Some(dir) => {
                let started = Archiver::start(&env, journal.status(), dir.clone(), facts.cluster_id.clone());
                Some(started.map_err(threads)?)
            }
        };
        let archive = archiver.as_ref().map(Archiver::status);
        loaded.core.set_last_checkpoint(loaded.image);
        let parts = owner::OwnerParts {
            env: env.clone(),
            journal,
            imager,
            checkpoints: checkpoint_knobs(&settings, &facts.cluster_id, loaded.image),
            tick_ms: settings.tick_ms,
            inbox,
        };
        let (tell_end, ended) = watch::channel(None);
        let core = loaded.core;
        let run = move || async move {
            let end = owner::run(core, parts).await;
            tell_end.send_replace(Some(end));
        };
        let owner_thread = env.work.owner("nn-owner", run).map_err(threads)?;
        let (stop, stopped) = watch::channel(false);
        let (rpc_addr, http_addr) = (listener.local_addr(), http_listener.as_ref().map(|one| one.local_addr()));
        let storage = service::Storage {
            env: env.clone(),
            journal: journal_status.clone(),
            archive: archive.clone(),
            backed_up: archiver.as_ref().map(Archiver::backups),
            configured_dirs: settings.dirs.len() as u32,
            cluster_id: facts.cluster_id.clone(),
            pool_id: facts.pool_id.clone(),
            backups: Arc::new(Semaphore::new(1)),
        };
        let groups = Groups::new(env.clone(), settings.groups_cache_ms);
        let mut tasks = serve_rpc(&env, &settings, listener, storage, &owner, &groups, stopped.clone());
        if let Some(listener) = http_listener {
            let names = settings.http_names.iter().cloned().chain([process::host_name()]);
            let state = http::State {
                env: env.clone(),
                owner: owner.clone(),
                groups,
                journal: journal_status,
                archive,
                cluster_id: facts.cluster_id.clone(),
                rpc_addr,
                guard: Guard::new(names, "the setting namenode.http_names"),
                proxy_users: settings.proxy_users.clone().into(),
                nodes: Arc::default(),
            };
            tasks.push(tokio::spawn(http::serve(listener, state, stopped)));
        }
        let (cluster_id, pool_id) = (facts.cluster_id, facts.pool_id);
        Ok(Running { rpc_addr, http_addr, cluster_id, pool_id, owner, owner_thread, ended, stop, tasks, archiver, env })
    }
}

async fn load_off_thread(env: &Env, settings: &NamenodeSettings) -> Result<load::Loaded> {
    let superuser = process::user_name();
    let mut core = settings.core.clone();
    if core.superuser.is_empty() {
        // Who started the namenode has all rights, also on a cluster that somebody else formatted.
        core.superuser.clone_from(&superuser);
    }
    let plan = load::LoadPlan {
        fs: Arc::clone(&env.fs),
        work: env.work.clone(),
        clock: env.clock.clone(),
        dirs: settings.dirs.clone(),
        accept_missing_dir: settings.accept_missing_dir,
        core,
        superuser,
        supergroup: settings.supergroup.clone(),
        sizes: LogSizes { segment_bytes: settings.segment_bytes, step_bytes: settings.segment_step_bytes },
        restore: settings.restore.clone(),
        archive: settings.archive.clone(),
    };
    let entropy = env.entropy.clone();
    env.work.io(move || load::load(&plan, &mut || entropy.uuid())).await
}

fn checkpoint_knobs(
    settings: &NamenodeSettings,
    cluster_id: &str,
    newest: cairn_proto::ids::TxId,
) -> checkpoint::CheckpointKnobs {
    checkpoint::CheckpointKnobs {
        edits: settings.checkpoint_edits,
        interval_ms: settings.checkpoint_interval_ms,
        retry_ms: settings.checkpoint_retry_ms,
        level: settings.image_level,
        cluster_id: cluster_id.to_owned(),
        newest,
    }
}

/// Starts the accept loop, with Hadoop's protocol behind it, and the gRPC server.
fn serve_rpc(
    env: &Env,
    settings: &NamenodeSettings,
    listener: cairn_common::net::Listener,
    storage: service::Storage,
    owner: &OwnerRef,
    groups: &Groups,
    mut stopped: watch::Receiver<bool>,
) -> Vec<JoinHandle<()>> {
    let (served, connections) = mpsc::channel(ADMITTED);
    let door = accept::Door {
        env: env.clone(),
        listener,
        cluster_id: storage.cluster_id.clone(),
        journal: storage.journal.clone(),
        max_connections: settings.max_connections,
        served,
        hadoop: Arc::new(ClientProtocol::new(
            owner.clone(),
            groups.clone(),
            storage.pool_id.clone(),
            settings.proxy_users.clone(),
        )),
        hadoop_limits: Limits { calls: settings.calls_per_connection as usize, ..Limits::default() },
        stop: stopped.clone(),
    };
    let service = service::Service::new(owner.clone(), groups.clone(), storage);
    let server = tonic::transport::Server::builder()
        .max_concurrent_streams(settings.calls_per_connection)
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        .add_service(NamenodeServer::new(service.clone()).max_decoding_message_size(MAX_RPC_BYTES))
        .add_service(ClusterServer::new(service).max_decoding_message_size(MAX_RPC_BYTES))
        .serve_with_incoming_shutdown(ReceiverStream::new(connections), async move {
            // An error means that the `Running` was dropped: then the server ends as well.
            let _ = stopped.wait_for(|&stop| stop).await;
        });
    let server = tokio::spawn(async move {
        if let Err(error) = server.await {
            tracing::error!(%error, "the RPC server ended");
        }
    });
    vec![tokio::spawn(accept::accept(door)), server]
}

impl Running {
    /// Returns when the namenode cannot go on (no metadata directory is left), with the reason. The process should end then.
    pub async fn failed(&self) -> Error {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(end) => match &*end {
                Some(Err(error)) => error.clone(),
                _ => Error::new(ErrorCode::Internal, "the namenode has stopped"),
            },
            Err(_) => Error::new(ErrorCode::Internal, "the owner of the namespace has panicked; see the log"),
        }
    }

    #[cfg(test)]
    pub(crate) fn owner_for_tests(&self) -> &OwnerRef {
        &self.owner
    }

    /// Ends in order: what was asked is answered, all is durable, the directories are free.
    pub async fn shutdown(self) -> Result<()> {
        // The owner first: it ends the report streams, which would keep the server waiting.
        let _ = self.owner.send(owner::Inbox::Stop).await;
        self.owner_thread.join().await;
        if let Some(archiver) = self.archiver {
            archiver.close().await;
        }
        // Nobody may be listening any more.
        let _ = self.stop.send(true);
        for mut task in self.tasks {
            if self.env.clock.timeout(DRAIN, &mut task).await.is_err() {
                task.abort();
                let _ = task.await;
            }
        }
        let end = self.ended.borrow().clone();
        end.unwrap_or_else(|| Err(Error::new(ErrorCode::Internal, "the owner of the namespace has panicked")))
    }
}
