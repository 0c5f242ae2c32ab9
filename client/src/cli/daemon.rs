//! `namenode`, `datanode`: one role in this process until a signal ends it.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;

use cairn_client::fs::Result;
use cairn_client::webhdfs::WebGate;
use cairn_common::process;
use cairn_datanode::{Datanode, DatanodeSettings, Extras, WebDoor};
use cairn_namenode::{Namenode, NamenodeSettings, RestorePlan, RestoreTarget};
use cairn_proto::ids::TxId;

use crate::args::{DatanodeArgs, NamenodeArgs};
use crate::context::Context;
use crate::output::Outcome;

/// `None`: a signal came first.
async fn unless_stopped<T>(
    start: impl Future<Output = Result<T>>,
    stop: impl Future<Output = ()>,
) -> Result<Option<T>> {
    tokio::select! {
        biased;
        () = stop => Ok(None),
        started = start => started.map(Some),
    }
}

fn given<T>(setting: &mut T, flag: Option<T>) {
    if let Some(value) = flag {
        *setting = value;
    }
}

fn given_dirs(setting: &mut Vec<PathBuf>, flag: &[PathBuf]) {
    if !flag.is_empty() {
        *setting = flag.to_vec();
    }
}

/// `namenode`
pub async fn namenode(context: &Context, args: &NamenodeArgs) -> Outcome {
    let mut settings: NamenodeSettings = context.config.table("namenode", &NamenodeSettings::default())?;
    given_dirs(&mut settings.dirs, &args.dir);
    given(&mut settings.listen, args.listen.clone());
    settings.http = args.http.clone().or(settings.http);
    settings.accept_missing_dir |= args.accept_missing_dir;
    settings.archive = args.archive.clone().or(settings.archive);
    settings.restore = args.restore.clone().map(|file| RestorePlan {
        file,
        log: args.log.clone(),
        target: match (args.to_txid, args.to_time) {
            (Some(txid), _) => RestoreTarget::TxId(TxId(txid)),
            (None, Some(time_ms)) => RestoreTarget::Time(time_ms),
            (None, None) => RestoreTarget::Last,
        },
    });
    settings.insecure |= args.insecure;
    settings.validate()?;
    let mut stop = std::pin::pin!(process::shutdown_signal());
    let Some(running) = unless_stopped(Namenode::start(context.env.clone(), settings), &mut stop).await? else {
        return Ok(());
    };
    tokio::select! {
        biased;
        () = stop => Ok(running.shutdown().await?),
        error = running.failed() => Err(error.into()),
    }
}

/// `datanode`
pub async fn datanode(context: &Context, args: &DatanodeArgs) -> Outcome {
    let mut settings: DatanodeSettings = context.config.table("datanode", &DatanodeSettings::default())?;
    given(&mut settings.namenode, context.global.namenode.clone());
    given_dirs(&mut settings.dirs, &args.dir);
    given(&mut settings.listen, args.listen.clone());
    settings.http = args.http.clone().or(settings.http);
    settings.advertise = args.advertise.clone().or(settings.advertise);
    settings.host = args.name.clone().or(settings.host);
    given(&mut settings.rack, args.rack.clone());
    settings.capacity_bytes = args.capacity.or(settings.capacity_bytes);
    given(&mut settings.task_slots, args.slots);
    settings.insecure |= args.insecure;
    settings.allow_jobs |= args.allow_jobs;
    settings.task_user = args.task_user.clone().or(settings.task_user);
    settings.validate()?;
    let mut stop = std::pin::pin!(process::shutdown_signal());
    let web: Arc<dyn WebDoor> = Arc::new(WebGate::new(context.env.clone(), &settings.namenode));
    let extras = Extras { web: Some(web), ..Extras::default() };
    let Some(running) = unless_stopped(Datanode::start(context.env.clone(), settings, extras), &mut stop).await? else {
        return Ok(());
    };
    tokio::select! {
        biased;
        () = stop => {
            running.shutdown().await;
            Ok(())
        }
        error = running.failed() => Err(error.into()),
    }
}
