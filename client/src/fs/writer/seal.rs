//! Data becomes frames on the work pool: several at a time, in order.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use cairn_common::work::Work;
use cairn_proto::frame::{Codec, Frame, Sealer};
use cairn_proto::ids::BlockId;
use tokio::sync::OwnedSemaphorePermit;

use super::super::namenode::lock;

/// Compressors that wait for their next frame; each holds tables of about a megabyte.
#[derive(Default)]
pub(crate) struct SealerPool {
    idle: Arc<Mutex<Vec<Sealer>>>,
}

/// Compressors kept; more than one per core is of no use.
const IDLE_SEALERS: usize = 8;

/// A piece of the file on its way; the permit is its share of the writer's window.
pub(super) struct Raw {
    pub(super) data: Bytes,
    pub(super) permit: OwnedSemaphorePermit,
}

/// A frame that is not yet acknowledged.
pub(super) struct Sealed {
    pub(super) frame: Frame,
    pub(super) raw: Raw,
}

impl Sealed {
    /// Where it ends in the block.
    pub(super) fn end(&self) -> u64 {
        self.frame.header.end()
    }
}

impl SealerPool {
    /// Seals `pieces`, the first of which starts at `offset` of `block`. Each comes with whether compression is worth trying.
    pub(super) async fn seal(
        &self,
        work: &Work,
        block: BlockId,
        mut offset: u64,
        compress: bool,
        pieces: Vec<(Raw, bool)>,
    ) -> Vec<Sealed> {
        let idle = Arc::clone(&self.idle);
        work.cpu(move || {
            // A sealer that only stores costs nothing to make.
            let pooled = if compress { lock(&idle).pop() } else { None };
            let mut sealer = pooled.unwrap_or_else(|| Sealer::new(compress));
            let mut sealed = Vec::with_capacity(pieces.len());
            for (raw, try_compress) in pieces {
                let frame = sealer.seal(block, offset, raw.data.clone(), try_compress);
                offset = frame.header.end();
                sealed.push(Sealed { frame, raw });
            }
            if compress {
                let mut idle = lock(&idle);
                if idle.len() < IDLE_SEALERS {
                    idle.push(sealer);
                }
            }
            sealed
        })
        .await
    }
}

/// Decides whether compression is worth trying, from what it brought lately. Incompressible data is probed more and more
/// seldom, up to every 64th frame, so that a file which changes its nature is noticed.
#[derive(Default)]
pub(super) struct Judge {
    misses: u32,
    skip: u32,
}

const MISSES_BEFORE_SKIPPING: u32 = 4;
const LONGEST_SKIP: u32 = 64;

impl Judge {
    /// Try the next frame?
    pub(super) fn try_next(&mut self) -> bool {
        if self.skip == 0 {
            return true;
        }
        self.skip -= 1;
        false
    }

    /// Takes note of a frame whose compression was tried.
    pub(super) fn learn(&mut self, frame: &Frame) {
        let header = &frame.header;
        let gained = header.codec == Codec::Zstd && header.stored_len < header.raw_len - header.raw_len / 16;
        if gained {
            *self = Self::default();
            return;
        }
        self.misses += 1;
        if self.misses >= MISSES_BEFORE_SKIPPING {
            let doublings = (self.misses - MISSES_BEFORE_SKIPPING).min(3);
            self.skip = (8 << doublings).min(LONGEST_SKIP);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(sealer: &mut Sealer, data: Vec<u8>) -> Frame {
        sealer.seal(BlockId(1), 0, data.into(), true)
    }

    #[test]
    fn incompressible_data_is_probed_seldom_and_a_gain_ends_that() {
        let noise: Vec<u8> = {
            let entropy = cairn_common::entropy::Entropy::seeded(1);
            let mut bytes = vec![0; 10_000];
            entropy.fill(&mut bytes);
            bytes
        };
        let mut sealer = Sealer::new(true);
        let mut judge = Judge::default();
        let mut tried = 0;
        for _ in 0..1_000 {
            if judge.try_next() {
                tried += 1;
                judge.learn(&frame(&mut sealer, noise.clone()));
            }
        }
        assert!((10..40).contains(&tried), "tried {tried} of 1,000");
        judge.learn(&frame(&mut sealer, vec![b'a'; 10_000]));
        assert!(judge.try_next() && judge.try_next());
    }
}
