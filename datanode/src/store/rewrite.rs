//! Finalized replicas that are cut: a new file under a new generation, then the old one goes.
//!
//! # Consistency
//! A finalized file never changes. Whole frames are copied as they are; of the one in which the cut falls the data is decoded, and what is left
//! of it stored. Everything is verified on the way.
//!
//! # Crash
//! The new file is written among the copies (which a start removes), synced, renamed, its folder synced; only then the old one is removed. If
//! both are there at a start, the newer generation is served.

use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use cairn_common::durable::{File, OpenMode};
use cairn_proto::blockfile::{self, BlockIndex, HEADER_BYTES};
use cairn_proto::frame::{FRAME_HEADER_BYTES, FrameHeader, Sealer};
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::{Error, ErrorCode, Result};

use super::map::{Entry, Kind, not_found};
use super::{BlockStore, scan, stale};

/// What to cut.
#[derive(Clone, Copy)]
struct Cut {
    block: BlockId,
    new_generation: Generation,
    /// Bytes of data that stay.
    length: u64,
}

impl BlockStore {
    /// Cuts a finalized replica of at least generation `least` to `length` bytes under a new generation; durable when this returns. One that
    /// was cut to that length before only gets the generation. Returns the volume's id.
    pub async fn truncate(
        self: &Arc<Self>,
        block: BlockId,
        least: Generation,
        new_generation: Generation,
        length: u64,
    ) -> Result<String> {
        let check = |entry: &Entry| match &entry.kind {
            _ if entry.generation < least => Err(stale(block, entry.generation, least)),
            _ if entry.generation > new_generation => Err(stale(block, new_generation, entry.generation)),
            Kind::Finalized { length: whole, .. } if *whole < length || length == 0 => {
                let text = format!("block {block} has {whole} bytes here and cannot be cut to {length}");
                Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(block.to_string()))
            }
            Kind::Finalized { .. } => Ok(()),
            Kind::Corrupt { path, .. } => Err(scan::corrupt(path, &"set aside, it did not verify")),
            _ => Err(Error::new(ErrorCode::Busy, format!("block {block} is not finalized here: it cannot be cut"))),
        };
        let (volume, entry) = self.map().claim_for(block, new_generation, check)?;
        let (store, cut) = (Arc::clone(self), Cut { block, new_generation, length });
        self.env().work.io(move || store.cut_claimed(volume, entry, cut)).await
    }

    fn cut_claimed(&self, volume: usize, entry: Entry, cut: Cut) -> Result<String> {
        let Cut { block, new_generation, length } = cut;
        let storage_id = self.volume(volume).storage_id().to_owned();
        let made = match &entry.kind {
            Kind::Finalized { length: whole, .. } if entry.generation == new_generation && *whole == length => Ok(None),
            Kind::Finalized { length: whole, stored } if *whole == length => {
                self.renew(volume, &entry, cut).map(|durable| Some((*stored, durable)))
            }
            Kind::Finalized { length: whole, .. } => self.cut_file(volume, &entry, *whole, cut).map(Some),
            _ => Err(not_found(block)),
        };
        match made {
            Ok(Some((stored, durable))) => {
                let is_new_file = !matches!(entry.kind, Kind::Finalized { length: whole, .. } if whole == length);
                let kind = Kind::Finalized { length, stored };
                // A name that a power cut may take back is not announced as done.
                self.map().settle(volume, block, Entry { generation: new_generation, kind }, durable.is_ok());
                durable?;
                if is_new_file {
                    self.unlink(volume, block, &entry);
                }
                Ok(storage_id)
            }
            Ok(None) => {
                self.map().settle(volume, block, entry, true);
                Ok(storage_id)
            }
            Err(error) => {
                self.map().settle(volume, block, entry, false);
                Err(error)
            }
        }
    }

    /// It has the length already.
    fn renew(&self, volume: usize, entry: &Entry, cut: Cut) -> Result<Result<()>> {
        let storage = self.volume(volume);
        let path = storage.finalized_path(cut.block, entry.generation, cut.length)?;
        storage.rename_to_final(&path, cut.block, cut.new_generation, cut.length)?;
        self.cache.remove(cut.block, entry.generation);
        Ok(storage.sync_final(cut.block))
    }

    /// Makes the shorter file; returns its size, and whether its name is durable.
    fn cut_file(&self, volume: usize, entry: &Entry, whole: u64, cut: Cut) -> Result<(u64, Result<()>)> {
        let Cut { block, new_generation, length } = cut;
        let storage = self.volume(volume);
        let source = storage.finalized_path(block, entry.generation, whole)?;
        let opened = scan::open_finalized(&*self.env().fs, &source, block, whole)
            .map_err(|flaw| scan::corrupt(&source, &flaw))?;
        // The cut frame may grow when it is stored as it is.
        let most = opened.stored + (4 << 20);
        storage.reserve(most)?;
        let aside = storage.open_path(block, new_generation, true)?;
        let made = self.write_cut(&aside, &*opened.file, opened.header_bytes, block, length);
        storage.release(most);
        let made = made.and_then(|stored| {
            storage.rename_to_final(&aside, block, new_generation, length)?;
            Ok(stored)
        });
        match made {
            Ok(stored) => {
                storage.wrote(stored, 0);
                Ok((stored, storage.sync_final(block)))
            }
            Err(error) => {
                // Otherwise the next start removes it.
                let _ = self.env().fs.remove_file(&aside);
                Err(error)
            }
        }
    }

    fn write_cut(&self, aside: &Path, source: &dyn File, from: u64, block: BlockId, length: u64) -> Result<u64> {
        let fs = &self.env().fs;
        let failed = |error: io::Error| Error::io(format!("cutting block {block} into {}", aside.display()), &error);
        if fs.metadata(aside).map_err(failed)?.is_some() {
            fs.remove_file(aside).map_err(failed)?;
        }
        let target = fs.open(aside, OpenMode::Create).map_err(failed)?;
        target.write_all_at(&blockfile::encode_header(block), 0).map_err(failed)?;
        let (mut at, mut index) = (from, BlockIndex::new(HEADER_BYTES as u64));
        while index.data_length() < length {
            let (header, payload) = read_frame(source, block, at)?;
            if header.offset != index.data_length() {
                return Err(damaged(
                    block,
                    &format!("a frame starts at {}, not at {}", header.offset, index.data_length()),
                ));
            }
            at += header.frame_bytes() as u64;
            let (header, bytes, payload) = if header.end() <= length {
                (header, header.encode(block), payload)
            } else {
                let data = header.open(payload).map_err(|flaw| damaged(block, &flaw))?;
                let left = data.slice(..(length - header.offset) as usize);
                let frame = Sealer::new(false).seal(block, header.offset, left, false);
                (frame.header, frame.header_bytes, frame.payload)
            };
            let end = index.frames_end();
            target.write_all_at(&bytes, end).map_err(failed)?;
            target.write_all_at(&payload, end + FRAME_HEADER_BYTES as u64).map_err(failed)?;
            index.push(&header);
        }
        let tail = index.encode_tail(block);
        target.write_all_at(&tail, index.frames_end()).map_err(failed)?;
        target.sync_data().map_err(failed)?;
        Ok(index.frames_end() + tail.len() as u64)
    }
}

/// The frame at a place in a file, verified as it is stored.
pub fn read_frame(file: &dyn File, block: BlockId, at: u64) -> Result<(FrameHeader, Bytes)> {
    let failed = |error: io::Error| Error::io(format!("reading block {block}"), &error);
    let mut bytes = [0; FRAME_HEADER_BYTES];
    file.read_exact_at(&mut bytes, at).map_err(failed)?;
    let header = FrameHeader::decode(block, &bytes).map_err(|flaw| damaged(block, &flaw))?;
    let mut payload = vec![0; header.stored_len as usize];
    file.read_exact_at(&mut payload, at + FRAME_HEADER_BYTES as u64).map_err(failed)?;
    header.verify_stored(&payload).map_err(|flaw| damaged(block, &flaw))?;
    Ok((header, payload.into()))
}

fn damaged(block: BlockId, why: &dyn std::fmt::Display) -> Error {
    Error::new(ErrorCode::Corrupt, format!("block {block}: {why}")).with_subject(block.to_string())
}
