//! What the driver hears from nodes, and how it accepts attempts.

use cairn_proto::pb::job_record::Record;
use cairn_proto::pb::task_event::Event as What;
use cairn_proto::{ErrorCode, Result, pb};
use futures_util::StreamExt as _;

use super::commit;
use super::driver::{Driver, Ended, journal_ended};
use super::node::{Command, News, NodeNews};
use super::scheduler::AfterSuccess;

/// Outputs that are given their names at once.
const RENAMES_AT_ONCE: usize = 16;

impl Driver<'_> {
    /// Takes this news and all that is there beside it, then accepts what ended well.
    pub(super) async fn take_all(&mut self, first: Option<NodeNews>) -> Option<Ended> {
        let mut accepted = Vec::new();
        let mut next = first;
        while let Some((node, news)) = next {
            if let Err(ended) = self.take(&node, news, &mut accepted).await {
                return Some(ended);
            }
            next = self.news.try_recv().ok();
        }
        self.accept(accepted).await
    }

    async fn take(&mut self, node: &str, news: News, accepted: &mut Vec<Record>) -> std::result::Result<(), Ended> {
        let now_ms = self.now_ms();
        if matches!(news, News::Registered { .. } | News::Lost(_)) {
            self.silent.remove(node);
        }
        match news {
            News::Registered { held, running, kept } => {
                self.scheduler.keeps(node, &kept);
                self.scheduler.registered(node, &held, &running, now_ms);
            }
            News::NotFed(task) => self.scheduler.not_fed(node, &task),
            News::Refused(task) => self.scheduler.refused(node, &task, now_ms),
            News::NotStarted(_, error) | News::Lost(error) if error.code() == ErrorCode::StaleEpoch => {
                return Err(Ended::Superseded(error));
            }
            News::NotStarted(task, error) => {
                let failure = pb::TaskFailure { error: Some(error.to_wire()), ..Default::default() };
                self.attempt_failed(node, &task, failure, now_ms).await?;
            }
            News::Lost(error) => {
                self.links.remove(node);
                tracing::info!(node, %error, "a node is lost to the job");
                self.scheduler.node_lost(node, &error, now_ms);
            }
            News::Event(event) => {
                let task = event.task.unwrap_or_default();
                match event.event {
                    Some(What::Progress(progress)) => {
                        if !self.scheduler.progress(node, &task, progress.bytes, now_ms)
                            && let Some(link) = self.links.get(node)
                        {
                            link.send(Command::Kill(task));
                        }
                    }
                    Some(What::Success(success)) => {
                        self.succeeded(node, &task, success, accepted).await.map_err(journal_ended)?;
                    }
                    Some(What::Failure(failure)) => self.attempt_failed(node, &task, failure, now_ms).await?,
                    Some(What::Offer(offer)) => self.scheduler.offered(node, offer.slots),
                    None => {}
                }
            }
        }
        Ok(())
    }

    async fn attempt_failed(
        &mut self,
        node: &str,
        task: &pb::TaskId,
        failure: pb::TaskFailure,
        now_ms: u64,
    ) -> std::result::Result<(), Ended> {
        let why = failure.error.as_ref().map_or("", |error| &error.message);
        tracing::info!(node, kind = task.kind().as_str_name(), task.index, task.attempt, why, "attempt failed");
        let counts = self.scheduler.attempt_failed(node, task, &failure, now_ms);
        let (task, node_id) = (Some(*task), node.to_owned());
        let record = Record::Failed(pb::TaskFailed { task, node_id, error: failure.error, counts });
        self.journal.note(record).await.map_err(journal_ended)
    }

    /// An attempt that counts is written down: a map's at some time soon (its node has it, too), one with output before that gets its name.
    async fn succeeded(
        &mut self,
        node: &str,
        task: &pb::TaskId,
        success: pb::TaskSuccess,
        accepted: &mut Vec<Record>,
    ) -> Result<()> {
        let now_ms = self.now_ms();
        // How long a reduce stood by while maps ran says nothing of it.
        let elapsed_ms = success.elapsed_ms.saturating_sub(self.scheduler.waited_ms(node, task));
        let success = pb::TaskSuccess { elapsed_ms, ..success };
        let after = self.scheduler.succeeded(node, task, success.clone(), now_ms);
        if after == AfterSuccess::Ignore {
            return Ok(());
        }
        let info = self.scheduler.node(node);
        let locality = self.scheduler.locality(task).map_or(0, |locality| locality as u32 + 1);
        let record = Record::Accepted(pb::TaskAccepted {
            task: Some(*task),
            node_id: node.to_owned(),
            host: info.map(|info| info.host.clone()).unwrap_or_default(),
            rack: info.map(|info| info.rack.clone()).unwrap_or_default(),
            locality,
            success: Some(success),
        });
        if after == AfterSuccess::Commit {
            accepted.push(record);
            return Ok(());
        }
        self.journal.note(record).await
    }

    /// Writes down attempts with output, then gives their files their names.
    async fn accept(&mut self, accepted: Vec<Record>) -> Option<Ended> {
        if accepted.is_empty() {
            return None;
        }
        let of = |record: &Record| match record {
            Record::Accepted(one) => {
                let files = one.success.as_ref().map(|success| success.files.clone()).unwrap_or_default();
                one.task.map(|task| (one.node_id.clone(), task, files))
            }
            _ => None,
        };
        let tasks: Vec<(String, pb::TaskId, Vec<pb::OutputFile>)> = accepted.iter().filter_map(of).collect();
        if let Err(error) = self.journal.settle(accepted, false).await {
            return Some(journal_ended(error));
        }
        let (fs, staging) = (self.fs, self.staging.clone());
        let names = tasks.into_iter().map(|(node, task, files)| {
            let staging = &staging;
            async move { (commit::name_files(fs, staging, &files, false).await, node, task) }
        });
        let mut named = futures_util::stream::iter(names.collect::<Vec<_>>()).buffer_unordered(RENAMES_AT_ONCE);
        while let Some((result, node, task)) = named.next().await {
            match result {
                Ok(()) => self.scheduler.committed(&task),
                Err(error) => {
                    let failure = pb::TaskFailure { error: Some(error.to_wire()), ..Default::default() };
                    let now_ms = self.fs.env().clock.mono_ms();
                    if let Err(ended) = self.attempt_failed(&node, &task, failure, now_ms).await {
                        return Some(ended);
                    }
                }
            }
        }
        None
    }
}
