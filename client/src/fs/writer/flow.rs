//! Data on its way through a block: sealed, ready, under way, acknowledged; and markers between it.

use std::collections::VecDeque;
use std::sync::Arc;

use cairn_proto::dataplane::{Marker, MarkerKind};
use cairn_proto::ids::BlockId;
use cairn_proto::{Error, Result};
use futures_util::future::{Either, Ready};
use futures_util::stream::{FuturesOrdered, StreamExt};
use tokio::sync::oneshot;

use super::calls::OpenFile;
use super::link::WireUnit;
use super::seal::{Judge, Raw, Sealed};
use crate::fs::task::Task;

/// Pieces of work at a time.
const SEALS_IN_FLIGHT: usize = 4;

/// What the writer gives to the task of a block.
pub(super) enum Input {
    /// The next piece of data, at most a frame.
    Data(Raw),
    /// A request about all data before it; answered when it was carried out by the whole pipeline.
    Mark(MarkerKind, oneshot::Sender<()>),
    /// No more.
    Finish,
}

/// A marker that the pipeline has not answered.
pub(super) struct Mark {
    pub(super) marker: Marker,
    pub(super) done: Option<oneshot::Sender<()>>,
}

/// What is ready to go down the pipeline.
pub(super) enum Outgoing {
    Frame(Sealed),
    Mark(Mark),
}

/// Sealed together, each with whether compression was tried.
type Batch = Vec<(Outgoing, bool)>;

/// Everything of a block between the writer and the last ack.
#[derive(Default)]
pub(super) struct Flow {
    judge: Judge,
    sealing: FuturesOrdered<Either<Ready<Result<Batch>>, Task<Batch>>>,
    /// File data given to sealing.
    taken: u64,
    ready: VecDeque<Outgoing>,
    unacked: VecDeque<Sealed>,
    marks: VecDeque<Mark>,
    pub(super) acked: u64,
    pub(super) finishing: bool,
    /// A flush or sync was asked for: readers may have seen what was written.
    pub(super) shown: bool,
}

impl Flow {
    pub(super) fn takes_more(&self) -> bool {
        !self.finishing && self.sealing.len() < SEALS_IN_FLIGHT
    }

    pub(super) fn is_sealing(&self) -> bool {
        !self.sealing.is_empty()
    }

    pub(super) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Something was sent and not answered.
    pub(super) fn waits(&self) -> bool {
        !self.unacked.is_empty() || !self.marks.is_empty()
    }

    /// File data sent.
    pub(super) fn sent(&self) -> u64 {
        self.unacked.back().map_or(self.acked, Sealed::end)
    }

    pub(super) fn finish_sent(&self) -> bool {
        self.marks.iter().any(|mark| mark.marker.kind == MarkerKind::Finish)
    }

    /// The next unit asks the pipeline to make data durable.
    pub(super) fn durable_is_next(&self) -> bool {
        let durable = |mark: &Mark| matches!(mark.marker.kind, MarkerKind::Sync | MarkerKind::Finish);
        matches!(self.ready.front(), Some(Outgoing::Mark(mark)) if durable(mark))
    }

    /// Hands inputs to sealing, in order.
    pub(super) fn take(&mut self, file: &Arc<OpenFile>, block: BlockId, inputs: &mut Vec<Input>) {
        let mut pieces = Vec::with_capacity(inputs.len());
        for input in inputs.drain(..) {
            match input {
                Input::Data(raw) => pieces.push((raw, file.compress && self.judge.try_next())),
                Input::Mark(kind, done) => {
                    self.seal(file, block, std::mem::take(&mut pieces));
                    self.mark(kind, Some(done));
                    self.shown = true;
                }
                Input::Finish => {
                    self.seal(file, block, std::mem::take(&mut pieces));
                    self.mark(MarkerKind::Finish, None);
                    self.finishing = true;
                }
            }
        }
        self.seal(file, block, pieces);
    }

    fn mark(&mut self, kind: MarkerKind, done: Option<oneshot::Sender<()>>) {
        let mark = Mark { marker: Marker { kind, length: self.taken }, done };
        let batch = vec![(Outgoing::Mark(mark), false)];
        self.sealing.push_back(Either::Left(futures_util::future::ready(Ok(batch))));
    }

    fn seal(&mut self, file: &Arc<OpenFile>, block: BlockId, pieces: Vec<(Raw, bool)>) {
        if pieces.is_empty() {
            return;
        }
        let offset = self.taken;
        self.taken += pieces.iter().map(|(raw, _)| raw.data.len() as u64).sum::<u64>();
        let tried: Vec<bool> = pieces.iter().map(|(_, tried)| *tried).collect();
        let file = Arc::clone(file);
        self.sealing.push_back(Either::Right(Task::spawn(async move {
            let inner = &file.fs.inner;
            let sealed = inner.sealers.seal(&inner.env.work, block, offset, file.compress, pieces).await;
            Ok(sealed.into_iter().map(Outgoing::Frame).zip(tried).collect())
        })));
    }

    /// Waits for the next sealed pieces; they are ready then. `None`: nothing is being sealed.
    pub(super) async fn sealed(&mut self) -> Option<Result<()>> {
        let batch = match self.sealing.next().await? {
            Ok(batch) => batch,
            Err(error) => return Some(Err(error)),
        };
        for (outgoing, tried) in batch {
            if let (Outgoing::Frame(sealed), true) = (&outgoing, tried) {
                self.judge.learn(&sealed.frame);
            }
            self.ready.push_back(outgoing);
        }
        Some(Ok(()))
    }

    /// The next unit, which counts as sent from now on.
    pub(super) fn next_unit(&mut self, block: BlockId) -> Option<WireUnit> {
        match self.ready.pop_front()? {
            Outgoing::Frame(sealed) => {
                let unit = WireUnit::frame(&sealed.frame);
                self.unacked.push_back(sealed);
                Some(unit)
            }
            Outgoing::Mark(mark) => {
                let unit = WireUnit::marker(block, mark.marker);
                self.marks.push_back(mark);
                Some(unit)
            }
        }
    }

    /// The pipeline holds this much. `true`: more than before.
    pub(super) fn on_held(&mut self, length: u64) -> bool {
        let grew = length > self.acked;
        self.acked = self.acked.max(length);
        while self.unacked.front().is_some_and(|sealed| sealed.end() <= self.acked) {
            self.unacked.pop_front();
        }
        grew
    }

    /// The first marker of this kind that waits for its answer.
    pub(super) fn answered(&mut self, kind: MarkerKind) -> Option<Mark> {
        let at = self.marks.iter().position(|mark| mark.marker.kind == kind)?;
        self.marks.remove(at)
    }

    /// Puts what is not acked back before what was not sent, each marker after the data that it is about.
    pub(super) fn send_again(&mut self) {
        let mut again = VecDeque::with_capacity(self.unacked.len() + self.marks.len() + self.ready.len());
        let mut marks = std::mem::take(&mut self.marks);
        for sealed in self.unacked.drain(..) {
            while marks.front().is_some_and(|mark| mark.marker.length < sealed.end()) {
                again.extend(marks.pop_front().map(Outgoing::Mark));
            }
            again.push_back(Outgoing::Frame(sealed));
        }
        again.extend(marks.into_iter().map(Outgoing::Mark));
        again.append(&mut self.ready);
        self.ready = again;
    }

    /// Takes all that there is, sent or not, for another block: a frame's header belongs to its block, so frames are made again from their
    /// data. Only before anything was acked.
    pub(super) async fn seal_anew(&mut self, file: &OpenFile, block: BlockId) {
        let inner = &file.fs.inner;
        let mut offset = 0;
        for outgoing in &mut self.ready {
            let Outgoing::Frame(sealed) = outgoing else { continue };
            let Some(none) = sealed.raw.permit.split(0) else { continue };
            let raw = std::mem::replace(&mut sealed.raw, Raw { data: bytes::Bytes::new(), permit: none });
            let pieces = vec![(raw, file.compress)];
            let made = inner.sealers.seal(&inner.env.work, block, offset, file.compress, pieces).await;
            if let Some(again) = made.into_iter().next() {
                offset = again.end();
                *sealed = again;
            }
        }
    }

    /// Waits until nothing is being sealed.
    pub(super) async fn all_sealed(&mut self) -> Result<(), Error> {
        while let Some(sealed) = self.sealed().await {
            sealed?;
        }
        Ok(())
    }
}
