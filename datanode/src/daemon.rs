//! The daemon: puts store, transfer and report together on one port.
//!
//! # Overview
//! [`Datanode::start`] opens the volumes, binds the ports and starts the tasks; registration goes on in the background. Connections are served once the
//! node knows its cluster (from its volumes, or from the first registration); until then they wait in the backlog.
//!
//! # Shutdown
//! [`Running::shutdown`] stops accepting, tells the writers of open pipelines, waits for them, and syncs what they wrote.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use cairn_common::Env;
use cairn_common::kv::{KeyValue, SledKv};
use cairn_common::net::opening::{self, Opening, ServerIdentity};
use cairn_common::net::rpc::RpcConn;
use cairn_common::net::{Conn, Listener};
use cairn_proto::{Error, Result};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use crate::pages::{self, Pages};
use crate::report::Reporter;
use crate::report::commands::Commands;
use crate::settings::DatanodeSettings;
use crate::store::{BlockStore, health};
use crate::tasks::{Executor, NodeName, TaskSettings};
use crate::transfer::{self, Transfer};
use crate::{Extras, TaskLoad, WebDoor, hadoop};

/// Connections at once, idle ones too.
pub(crate) const CONNECTIONS: u32 = 4_096;
/// How long a shutdown waits for the connections to end.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(10);
/// How long a node without volumes tries to tell the namenode.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// The role; see the module.
pub struct Datanode;

/// A running datanode.
pub struct Running {
    /// Data port, "IP:PORT".
    pub addr: String,
    /// HTTP port, if there is one.
    pub http_addr: Option<String>,
    /// This node's id.
    pub node_id: String,
    transfer: Arc<Transfer>,
    executor: Option<Executor>,
    web: Option<Arc<dyn WebDoor>>,
    /// Has the HTTP port closed.
    http_closed: watch::Sender<bool>,
    fatal: watch::Receiver<Option<Error>>,
    registered: watch::Receiver<u64>,
    connections: Arc<Semaphore>,
    tasks: Vec<JoinHandle<()>>,
}

impl Datanode {
    /// Starts a datanode. Fails on bad settings, on folders that are in use or of something else, on a taken port.
    pub async fn start(env: Env, settings: DatanodeSettings, mut extras: Extras) -> Result<Running> {
        settings.validate()?;
        let settings = Arc::new(settings);
        let store = BlockStore::open(&env, &settings).await?;
        let listener = env.net.bind(&settings.listen).await?;
        let http = match &settings.http {
            Some(http) => Some(env.net.bind(http).await?),
            None => None,
        };
        // Only now is it sure that no other process has these folders and this port.
        let host = settings.host.clone().unwrap_or_else(cairn_common::process::host_name);
        let name = NodeName { node_id: store.identity().node_id, host: host.clone(), rack: settings.rack.clone() };
        let executor = start_executor(&env, &settings, &name, &listener, &mut extras).await?;
        let outcomes = match extras.outcomes {
            Some(outcomes) => Some(outcomes),
            None => open_state(&env, &store).await,
        };
        let transfer = Transfer::new(&env, &settings, &store, extras.map_outputs, outcomes);
        let address = listener.local_addr().to_string();
        let http_addr = http.as_ref().map(|http| http.local_addr().to_string());
        let (fatal, fatal_seen) = watch::channel(None);
        let (registered, registered_seen) = watch::channel(0);
        let (http_closed, http_closed_seen) = watch::channel(false);
        let load: Option<Arc<dyn TaskLoad>> = extras.load;
        let reporter = Arc::new(Reporter {
            transfer: Arc::clone(&transfer),
            commands: Commands::start(&transfer),
            host,
            address: settings.advertise.clone().unwrap_or_else(|| address.clone()),
            http_address: settings.advertise_http.clone().or_else(|| http_addr.clone()).unwrap_or_default(),
            load,
            fatal,
            registered,
            in_touch: AtomicBool::new(false),
            beats: watch::channel(0).0,
        });
        let connections = Arc::new(Semaphore::new(CONNECTIONS as usize));
        let rpc = extras.routes.map(|routes| serve_rpc(&transfer, routes));
        let mut tasks = Vec::new();
        let accept = accept(Arc::clone(&transfer), listener, registered_seen.clone(), Arc::clone(&connections), rpc);
        tasks.push(tokio::spawn(accept));
        if let Some(http) = http {
            let pages = Pages::new(&reporter, extras.web.clone(), name, http_closed_seen);
            tasks.push(tokio::spawn(pages::serve(http, pages)));
        }
        tasks.push(tokio::spawn(crate::scrub::run(Arc::clone(&transfer))));
        tasks.push(tokio::spawn(crate::store::quarantine::keep(Arc::clone(&transfer))));
        tasks.push(tokio::spawn(keep_volumes(Arc::clone(&reporter))));
        tasks.push(tokio::spawn(reporter.run()));
        let node_id = store.identity().node_id;
        tracing::info!("datanode {node_id} listens on {address}");
        Ok(Running {
            addr: address,
            http_addr,
            node_id,
            transfer,
            executor,
            web: extras.web,
            http_closed,
            fatal: fatal_seen,
            registered: registered_seen,
            connections,
            tasks,
        })
    }
}

impl Running {
    /// Resolves when the namenode refuses this node for good; the daemon should then end with this error.
    pub async fn failed(&self) -> Error {
        let mut fatal = self.fatal.clone();
        match fatal.wait_for(Option::is_some).await {
            Ok(error) => error.clone().unwrap_or_else(ended),
            // The reporter ended without one, as it does in a shutdown.
            Err(_) => std::future::pending().await,
        }
    }

    /// Resolves after the first registration.
    pub async fn registered(&self) {
        let mut registered = self.registered.clone();
        let _ = registered.wait_for(|count| *count > 0).await;
    }

    /// Ends the daemon in an orderly way.
    pub async fn shutdown(self) {
        let Self { transfer, connections, tasks, executor, web, http_closed, .. } = self;
        // Before all: the namenode sends nobody to a port that takes no connection.
        http_closed.send_replace(true);
        // While the data plane still works: what is half written is taken away.
        if let Some(web) = web {
            web.close().await;
        }
        // First, so that workers do not see their node vanish under them.
        if let Some(executor) = executor {
            executor.stop().await;
        }
        let open = transfer.store.map().open_replicas();
        transfer.stop();
        let clock = transfer.env.clock.clone();
        let all = clock.timeout(SHUTDOWN_LIMIT, connections.acquire_many(CONNECTIONS)).await;
        if all.is_err() {
            tracing::warn!("some connections did not end within {SHUTDOWN_LIMIT:?}");
        }
        for replica in open {
            if replica.wait_ended(&clock, SHUTDOWN_LIMIT).await.is_err() {
                continue;
            }
            let file = replica.snapshot().0;
            if let Err(error) = transfer.env.work.io(move || file.sync_data()).await {
                tracing::warn!("syncing an open block at shutdown: {error}");
            }
        }
        let synced = Arc::clone(&transfer.store);
        transfer.env.work.io(move || synced.sync_open_names()).await;
        for task in tasks {
            let abort = task.abort_handle();
            if clock.timeout(SHUTDOWN_LIMIT, task).await.is_err() {
                abort.abort();
            }
        }
    }
}

/// Starts the executor of tasks, unless the node runs none or its caller has brought another.
async fn start_executor(
    env: &Env,
    settings: &DatanodeSettings,
    name: &NodeName,
    listener: &Listener,
    extras: &mut Extras,
) -> Result<Option<Executor>> {
    if settings.task_slots == 0 || extras.routes.is_some() {
        return Ok(None);
    }
    let tasks = TaskSettings {
        allow_jobs: settings.allow_jobs,
        loopback: listener.local_addr().ip().is_loopback(),
        worker_command: settings.worker_command.clone(),
        driver_command: settings.driver_command.clone(),
        lease_ms: settings.job_lease_ms,
        log_keep_ms: settings.task_log_keep_ms,
        starvation_ms: settings.task_starvation_ms,
        user_weights: settings.weights()?,
        disk_reserve: settings.reserved_bytes,
        kept_bytes: settings.task_kept_bytes,
        cgroups: settings.task_cgroups,
        task_user: settings.task_user.clone(),
        ..TaskSettings::new(settings.dirs.clone(), settings.task_slots)
    };
    let executor = Executor::start(env, tasks, name.clone()).await?;
    extras.routes = Some(tonic::service::Routes::new(executor.service()));
    extras.map_outputs.get_or_insert_with(|| executor.outputs());
    extras.load.get_or_insert_with(|| executor.load());
    Ok(Some(executor))
}

/// Ends the daemon when too few volumes are left, after the namenode was told of it if it listens.
async fn keep_volumes(reporter: Arc<Reporter>) {
    let transfer = &reporter.transfer;
    let error = tokio::select! {
        biased;
        () = transfer.stopping() => return,
        error = health::keep(&transfer.store, &transfer.settings) => error,
    };
    tracing::error!("{error}");
    let mut beats = reporter.beats.subscribe();
    let first = *beats.borrow();
    // The one under way may have been put together before.
    let told = beats.wait_for(|count| *count >= first + 2);
    tokio::select! {
        biased;
        () = transfer.stopping() => return,
        _ = transfer.env.clock.timeout(LAST_WORDS, told) => {}
    }
    reporter.fatal.send_replace(Some(error));
}

fn ended() -> Error {
    Error::new(cairn_proto::ErrorCode::Internal, "the datanode ended")
}

/// A node in this process that has just ended may hold its notes for a moment.
const STATE_PATIENCE_MS: u64 = 2_000;
const STATE_PAUSE: Duration = Duration::from_millis(10);

/// Opens the node's private notes; without them it serves all the same.
async fn open_state(env: &Env, store: &BlockStore) -> Option<Arc<dyn KeyValue>> {
    let path = store.volumes().iter().find(|volume| !volume.is_failed())?.root().join("state");
    let limit_ms = env.clock.mono_ms() + STATE_PATIENCE_MS;
    loop {
        let (fs, clock, path) = (Arc::clone(&env.fs), env.clock.clone(), path.clone());
        match env.work.io(move || SledKv::open(&*fs, &clock, &path)).await {
            Ok((store, _)) => return Some(Arc::new(store)),
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy && env.clock.mono_ms() < limit_ms => {
                env.clock.sleep(STATE_PAUSE).await;
            }
            Err(error) => {
                tracing::warn!("the state folder cannot be used ({error}); outcomes of checks are not kept");
                return None;
            }
        }
    }
}

pub(crate) type RpcQueue = mpsc::Sender<std::io::Result<RpcConn>>;

/// Serves gRPC on connections that come through the queue.
fn serve_rpc(transfer: &Arc<Transfer>, routes: tonic::service::Routes) -> RpcQueue {
    let (queue, incoming) = mpsc::channel::<std::io::Result<RpcConn>>(64);
    let transfer = Arc::clone(transfer);
    tokio::spawn(async move {
        let server = tonic::transport::Server::builder().add_routes(routes);
        let stopping = async move { transfer.stopping().await };
        if let Err(error) = server.serve_with_incoming_shutdown(ReceiverStream::new(incoming), stopping).await {
            tracing::warn!("the gRPC server ended: {error}");
        }
    });
    queue
}

pub(crate) async fn accept(
    transfer: Arc<Transfer>,
    listener: Listener,
    mut registered: watch::Receiver<u64>,
    connections: Arc<Semaphore>,
    rpc: Option<RpcQueue>,
) {
    if transfer.store.map().pool().is_empty() {
        tokio::select! {
            biased;
            () = transfer.stopping() => return,
            known = registered.wait_for(|count| *count > 0) => if known.is_err() { return },
        }
    }
    loop {
        let conn = tokio::select! {
            biased;
            () = transfer.stopping() => return,
            conn = listener.accept() => conn,
        };
        let conn = match conn {
            Ok(conn) => conn,
            Err(error) => {
                // No descriptors left, or a peer that left at once.
                tracing::warn!("accepting a connection: {error}");
                transfer.env.clock.sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&connections).try_acquire_owned() else {
            tracing::warn!("{} turned away: {CONNECTIONS} connections are open", conn.peer_addr());
            continue;
        };
        let (transfer, rpc) = (Arc::clone(&transfer), rpc.clone());
        tokio::spawn(async move {
            serve_connection(transfer, conn, rpc).await;
            drop(place);
        });
    }
}

async fn serve_connection(transfer: Arc<Transfer>, conn: Conn, rpc: Option<RpcQueue>) {
    let identity = transfer.store.identity();
    let identity = ServerIdentity { cluster_id: identity.cluster_id, epoch: identity.epoch };
    let who = conn.peer_addr();
    let opened = tokio::select! {
        biased;
        () = transfer.stopping() => return,
        opened = opening::read_opening(conn, &identity, &transfer.env.clock) => opened,
    };
    match opened {
        Ok(Opening::Data { conn, .. }) => transfer::serve_data(transfer, conn).await,
        Ok(Opening::Rpc { conn, peer }) => match rpc {
            // The server lives as long as the daemon.
            Some(rpc) => drop(rpc.send(Ok(RpcConn::new(conn, peer))).await),
            None => tracing::debug!("{who} asked for gRPC, but this datanode runs no tasks"),
        },
        Ok(Opening::HadoopData(conn)) => hadoop::serve(transfer, conn).await,
        Ok(Opening::Hadoop(conn)) => hadoop::serve_rpc(transfer, conn).await,
        Ok(Opening::Unknown(conn, first)) if first.starts_with(&hadoop::SASL_MAGIC) => {
            hadoop::refuse_sasl(&transfer, conn).await;
        }
        Ok(Opening::Http(mut conn)) => {
            let text = "this is a Cairn datanode's data port; see --http for /health and /metrics\n";
            pages::respond(&mut conn, "400 Bad Request", "text/plain", text).await;
        }
        Ok(_) => tracing::debug!("{who} speaks a protocol that is not served here"),
        Err(error) => tracing::debug!("{who}: {error}"),
    }
}
