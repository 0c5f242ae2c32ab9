//! `admin backup`, `admin confirm-restore`.

use std::path::Path;

use crate::context::Context;
use crate::output::Outcome;
use crate::show::{HoleJson, ReportJson};
use crate::stream::temporary_name;
use crate::units::human_size;

/// `admin backup FILE`
pub async fn backup(context: &mut Context, file: &Path) -> Outcome {
    let fs = context.connect().await?;
    // A name of its own: two backups to one file at a time must not write one.
    let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let aside = file.with_file_name(temporary_name(&context.env, &name));
    let ticket = context.leftovers.local(aside.clone());
    let made = fs.backup_namenode(file, &aside).await?;
    context.leftovers.keep(ticket);
    let out = &mut context.out;
    if out.json {
        let value = serde_json::json!({
            "file": file.display().to_string(), "image_txid": made.image_txid, "last_txid": made.last_txid, "bytes": made.bytes
        });
        return out.json(&value);
    }
    out.line(format!(
        "{}: {}; transactions {} to {} can be restored with it, later ones with an archive",
        file.display(),
        human_size(made.bytes),
        made.image_txid,
        made.last_txid
    ))
}

/// `admin confirm-restore`
pub async fn confirm_restore(context: &mut Context) -> Outcome {
    let fs = context.connect().await?;
    let txid = fs.confirm_restore().await?;
    let out = &mut context.out;
    if out.json {
        return out.json(&serde_json::json!({"restored_to_txid": txid}));
    }
    match txid {
        0 => out.line("no restore waits to be confirmed"),
        _ => out.line(format!(
            "the restore to transaction {txid} is confirmed: replicas that the namespace does not know go into quarantine"
        )),
    }
}

/// What there is to say while a restore waits to be confirmed.
pub fn unconfirmed(restored_to_txid: u64) -> Option<String> {
    (restored_to_txid != 0).then(|| {
        format!(
            "restored to transaction {restored_to_txid}, not confirmed: nothing is deleted on datanodes until `cairn admin confirm-restore`"
        )
    })
}

/// What an operator has to know of metadata directories, archive and restore; nothing when all is as it should be.
pub fn warnings(report: &ReportJson) -> Vec<String> {
    let mut lines: Vec<String> = unconfirmed(report.restored_to_txid).into_iter().collect();
    if report.metadata_dirs < report.metadata_dirs_configured {
        lines.push(format!(
            "only {} of {} metadata directories in use: one has failed, see the namenode's log",
            report.metadata_dirs, report.metadata_dirs_configured
        ));
    }
    if !report.archive_failure.is_empty() {
        let behind = report.last_txid.saturating_sub(report.archived_txid);
        lines.push(format!("the archive is {behind} transactions behind: {}", report.archive_failure));
    }
    if let Some(HoleJson { from, to }) = &report.archive_hole {
        lines.push(format!("the archive has a hole from txid {from} to {to}: take a new backup (cairn admin backup)"));
    }
    lines
}
