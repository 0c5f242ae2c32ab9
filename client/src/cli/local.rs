//! `local`: a cluster on this machine until a signal ends it.

use std::path::PathBuf;
use std::time::Duration;

use cairn_client::fs::ErrorCode;
use cairn_common::process;
use cairn_datanode::DatanodeSettings;
use cairn_namenode::NamenodeSettings;

use crate::args::LocalArgs;
use crate::cluster::{Cluster, Plan};
use crate::context::Context;
use crate::output::{Failure, Outcome, complain, failure};
use crate::stream::local_error;

/// How soon the end of a child is noticed.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// `local`
pub async fn local(context: &mut Context, args: &LocalArgs) -> Outcome {
    if let Some(key) = context.config.set_without_table() {
        return Err(Failure::Usage(format!("--set {key}: say for whom, as in --set namenode.{key}=...")));
    }
    // What a child would refuse is refused before there are any.
    context.client_settings()?;
    context.config.table("namenode", &NamenodeSettings::default())?;
    context.config.table("datanode", &DatanodeSettings::default())?;
    let mut stop = std::pin::pin!(process::shutdown_signal());
    let dir = match &args.dir {
        Some(dir) => std::path::absolute(dir).map_err(|error| local_error("cannot use", dir, &error))?,
        None => temporary_folder(context, "cairn-local")?,
    };
    let plan = Plan {
        dir,
        datanodes: args.datanodes,
        racks: args.racks,
        base_port: args.base_port,
        flags: flags_for_children(context)?,
    };
    let env = context.env.clone();
    let mut cluster = Cluster::prepare(&env, &plan).await?;
    let outcome = async {
        cluster.start(&plan).await?;
        announce(context, &cluster, &plan)?;
        loop {
            env.clock.sleep(LOOK_AGAIN).await;
            for (name, how) in cluster.newly_ended() {
                complain(&format!("{name} ended ({how}); how to start it again: {}", cluster.log_of(&name)));
            }
            // A member that cannot be started now is asked for again or started by hand: the others go on.
            match cluster.serve_requests() {
                Ok(started) => started.iter().for_each(|name| complain(&format!("{name} is started again, as asked"))),
                Err(Failure::Error(error)) => complain(error.message()),
                Err(_) => {}
            }
        }
    };
    let outcome = tokio::select! {
        biased;
        () = &mut stop => Ok(()),
        outcome = outcome => outcome,
    };
    cluster.stop().await;
    outcome
}

fn announce(context: &mut Context, cluster: &Cluster, plan: &Plan) -> Outcome {
    let described = cluster.describe();
    let out = &mut context.out;
    if out.json {
        out.json(&described)?;
    } else {
        let (namenode, logs) = (&described.namenode, plan.dir.join("logs"));
        out.line(format!(
            "namenode {}, WebHDFS and metrics http://{}, logs in {}",
            namenode.rpc,
            namenode.http,
            logs.display()
        ))?;
        for node in &described.datanodes {
            out.line(format!("{} {} {} pid {}", node.name, node.addr, node.rack, node.pid))?;
        }
        if described.namenode.rpc != crate::args::DEFAULT_NAMENODE {
            out.line(format!("export CAIRN_NAMENODE={}", described.namenode.rpc))?;
        }
        out.line("ready")?;
    }
    out.flush()
}

/// A new folder that is removed when the program ends.
pub fn temporary_folder(context: &Context, name: &str) -> Outcome<PathBuf> {
    let dir = std::env::temp_dir().join(format!("{name}-{:016x}", context.env.entropy.next_u64()));
    let made = context.env.fs.create_dir_all(&dir).and_then(|()| context.env.fs.restrict(&dir));
    made.map_err(|error| local_error("cannot make", &dir, &error))?;
    context.leftovers.local(dir.clone());
    Ok(dir)
}

/// The settings that children must have, too.
pub fn flags_for_children(context: &Context) -> Outcome<Vec<String>> {
    let mut flags = Vec::new();
    if let Some(file) = &context.global.config {
        let whole = std::path::absolute(file).map_err(|error| local_error("cannot read", file, &error))?;
        let Some(text) = whole.to_str() else {
            let text = format!("{}: the name is not UTF-8", whole.display());
            return Err(failure(ErrorCode::InvalidArgument, text));
        };
        flags.extend(["--config".to_owned(), text.to_owned()]);
    }
    for (key, value) in &context.global.set {
        flags.extend(["--set".to_owned(), format!("{key}={value}")]);
    }
    Ok(flags)
}
