//! Fetching one partition of every map from the nodes that hold them.
//!
//! Nodes are asked in parallel, each on one connection, one partition after the other. What is fetched is verified at once, chunk by chunk, so that damage is
//! known as the map's whose output it is; it stays in memory as long as the share for it lasts, then goes to disk. A reduce may start before all maps
//! are done: it fetches what there is, and is told of the rest as it comes about.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use cairn_common::durable::{File, OpenMode};
use cairn_common::net::{Conn, opening, read_message, write_message};
use cairn_proto::mapoutput::{CHUNK_HEADER_BYTES, ChunkHeader};
use cairn_proto::pb::data_request::Op;
use cairn_proto::{Error, ErrorCode, Result, pb};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::io::AsyncReadExt as _;

use super::wanted::Wanted;
use super::{Context, Failed, Task};
use crate::mapreduce::reduce::Segment;

/// Nodes that are asked at once.
const NODES_AT_ONCE: usize = 4;
/// Pauses between attempts to fetch from a node before its outputs are taken for lost.
const RETRY_PAUSES_MS: [u64; 3] = [50, 200, 600];
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// A node that sends nothing for so long is given up.
const STALL_LIMIT: Duration = Duration::from_secs(15);
/// A reduce that waits for maps to be done stands still through no fault of its own, and says so this often.
const WAITING_BEAT: Duration = Duration::from_millis(500);
/// Piece in which a partition is taken off its connection when it goes to disk.
const PIECE_BYTES: usize = 256 << 10;

/// All of a reduce's input.
pub struct Fetched {
    /// In the order of the maps.
    pub segments: Vec<Segment>,
    /// Bytes fetched.
    pub bytes: u64,
    /// Those of them that went to disk.
    pub on_disk: u64,
}

struct Budget {
    left: AtomicU64,
}

impl Budget {
    fn take(&self, bytes: u64) -> bool {
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes)).is_ok()
    }
}

/// Fetches everything, or says which outputs are lost.
pub async fn fetch_all(context: &Context, task: &Task, inputs: Vec<pb::MapOutputLocation>) -> Result<Fetched, Failed> {
    let budget = Budget { left: AtomicU64::new(context.shares.fetched) };
    let mut wanted = Wanted::new(context.job.maps);
    wanted.add(inputs);
    let mut asked = FuturesUnordered::new();
    let (mut segments, mut lost, mut why) = (Vec::new(), Vec::new(), None);
    loop {
        while asked.len() < NODES_AT_ONCE
            && let Some((address, inputs)) = wanted.next()
        {
            let fetch = FromNode { context, task, budget: &budget, address, conn: None };
            asked.push(fetch.all(inputs));
        }
        // When something is lost, what else is known is fetched still, so that all that is lost is told at once.
        if asked.is_empty() && (why.is_some() || wanted.all_taken()) {
            break;
        }
        tokio::select! {
            Some(result) = asked.next() => {
                let (address, fetched, failed): (String, Vec<Got>, Vec<Lost>) = result?;
                wanted.answered(&address);
                segments.extend(fetched);
                for (input, error) in failed {
                    lost.push(input);
                    why.get_or_insert(error);
                }
            }
            inputs = task.inbox.take() => wanted.add(inputs),
            () = context.env.clock.sleep(WAITING_BEAT), if asked.is_empty() => task.user.progressed(),
        }
    }
    if let Some(error) = why {
        return Err(Failed { error, lost });
    }
    segments.sort_by_key(|one: &Got| one.map_index);
    Ok(Fetched {
        bytes: segments.iter().map(|one| one.bytes).sum(),
        on_disk: segments.iter().filter(|one| matches!(one.segment, Segment::File(_))).map(|one| one.bytes).sum(),
        segments: segments.into_iter().map(|one| one.segment).collect(),
    })
}

struct Got {
    map_index: u32,
    bytes: u64,
    segment: Segment,
}

type Lost = (pb::MapOutputLocation, Error);

struct FromNode<'a> {
    context: &'a Context,
    task: &'a Task,
    budget: &'a Budget,
    address: String,
    conn: Option<Conn>,
}

impl FromNode<'_> {
    /// Fetches from one node; an error is of this machine (a full disk), not of the other.
    async fn all(mut self, inputs: Vec<pb::MapOutputLocation>) -> Result<(String, Vec<Got>, Vec<Lost>)> {
        let (mut got, mut lost) = (Vec::new(), Vec::new());
        let mut gone: Option<Error> = None;
        for input in inputs {
            if let Some(error) = &gone {
                lost.push((input, error.clone()));
                continue;
            }
            match self.patiently(&input).await {
                Ok(one) => got.extend(one),
                Err(error) if error.code() == ErrorCode::DiskFull || error.code() == ErrorCode::Io => {
                    return Err(error);
                }
                Err(error) => {
                    // A node that cannot be reached does not get another round of attempts per map.
                    if matches!(error.code(), ErrorCode::Unreachable | ErrorCode::TimedOut) {
                        gone = Some(error.clone());
                    }
                    lost.push((input, error));
                }
            }
        }
        Ok((self.address, got, lost))
    }

    async fn patiently(&mut self, input: &pb::MapOutputLocation) -> Result<Option<Got>> {
        let mut pauses = RETRY_PAUSES_MS.iter();
        loop {
            let error = match self.one(input).await {
                Ok(got) => return Ok(got),
                Err(error) => error,
            };
            // Whatever went wrong, the connection may stand in the middle of something.
            self.conn = None;
            let again = matches!(error.code(), ErrorCode::Unreachable | ErrorCode::TimedOut | ErrorCode::Corrupt);
            let Some(pause) = pauses.next().filter(|_| again) else {
                let text = format!("cannot fetch the output of map {} from {}: {error}", input.map_index, self.address);
                return Err(Error::new(error.code(), text).with_subject(self.address.clone()));
            };
            self.context.env.clock.sleep(Duration::from_millis(*pause)).await;
        }
    }

    /// `None`: the map has nothing for this partition.
    async fn one(&mut self, input: &pb::MapOutputLocation) -> Result<Option<Got>> {
        let context = self.context;
        let mut conn = match self.conn.take() {
            Some(conn) => conn,
            None => opening::open_data(&context.env.net, &self.address, &context.hello(), CONNECT_LIMIT).await?,
        };
        let request = pb::ReadMapOutput {
            job_id: context.job.job_id.clone(),
            map_index: input.map_index,
            attempt: input.attempt,
            partition: self.task.id.index,
            token: context.job.token.clone(),
        };
        let request = pb::DataRequest { op: Some(Op::MapOutput(request)) };
        let address = self.address.clone();
        let left = |error: std::io::Error| {
            Error::new(ErrorCode::Unreachable, format!("{address} left: {error}")).with_subject(&address)
        };
        write_message(&mut conn, &request).await.map_err(left)?;
        let reply = context.env.clock.timeout(STALL_LIMIT, read_message(&mut conn, &self.address)).await;
        let reply: pb::ReadMapOutputReply = reply.map_err(|elapsed| self.stalled(elapsed))??;
        if let Some(error) = reply.error {
            return Err(Error::from_wire(error));
        }
        let bytes = reply.bytes;
        if bytes == 0 {
            self.conn = Some(conn);
            return Ok(None);
        }
        let segment = if self.budget.take(bytes) {
            Segment::Memory(self.to_memory(&mut conn, bytes).await?)
        } else {
            Segment::File(self.to_disk(&mut conn, bytes, input.map_index).await?)
        };
        self.conn = Some(conn);
        Ok(Some(Got { map_index: input.map_index, bytes, segment }))
    }

    fn stalled(&self, elapsed: cairn_common::clock::Elapsed) -> Error {
        Error::new(ErrorCode::TimedOut, format!("{}: {elapsed}", self.address)).with_subject(self.address.clone())
    }

    /// Fills `piece` up to `limit` bytes or says that the node has left or stalls.
    async fn read(&self, conn: &mut Conn, piece: &mut BytesMut, limit: usize) -> Result<()> {
        while piece.len() < limit {
            let missing = limit - piece.len();
            let mut room = bytes::BufMut::limit(&mut *piece, missing);
            let read = self.context.env.clock.timeout(STALL_LIMIT, conn.read_buf(&mut room)).await;
            match read.map_err(|elapsed| self.stalled(elapsed))? {
                Ok(1..) => self.task.user.progressed(),
                Ok(0) => return Err(Error::new(ErrorCode::Unreachable, format!("{} left", self.address))),
                Err(error) => {
                    return Err(Error::new(ErrorCode::Unreachable, format!("{} left: {error}", self.address)));
                }
            }
        }
        Ok(())
    }

    async fn to_memory(&self, conn: &mut Conn, bytes: u64) -> Result<Bytes> {
        let mut all = BytesMut::with_capacity(bytes as usize);
        self.read(conn, &mut all, bytes as usize).await?;
        let mut verifier = Verifier::default();
        verifier.push(&all)?;
        verifier.finish()?;
        Ok(all.freeze())
    }

    async fn to_disk(&self, conn: &mut Conn, bytes: u64, map_index: u32) -> Result<PathBuf> {
        let path = self.task.work_dir.join(format!("fetched-{map_index:05}"));
        let failed = |error: std::io::Error| Error::io(format!("cannot write {}", path.display()), &error);
        let (fs, target) = (Arc::clone(&self.context.env.fs), path.clone());
        let file = self.context.env.work.io(move || fs.open(&target, OpenMode::WriteOrCreate)).await.map_err(failed)?;
        let mut verifier = Verifier::default();
        let mut at = 0;
        while at < bytes {
            let mut piece = BytesMut::with_capacity(PIECE_BYTES);
            self.read(conn, &mut piece, PIECE_BYTES.min((bytes - at) as usize)).await?;
            verifier.push(&piece)?;
            let (file, piece) = (Arc::clone(&file), piece.freeze());
            let length = piece.len() as u64;
            self.context.env.work.io(move || write(&*file, &piece, at)).await.map_err(failed)?;
            at += length;
        }
        verifier.finish()?;
        Ok(path)
    }
}

fn write(file: &dyn File, piece: &[u8], at: u64) -> std::io::Result<()> {
    file.write_all_at(piece, at)
}

/// Checks chunks as they come.
#[derive(Default)]
struct Verifier {
    /// A chunk that is not complete yet.
    open: BytesMut,
}

impl Verifier {
    fn push(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.open.is_empty() {
                // Whole chunks are checked where they lie.
                match whole_chunk(bytes)? {
                    Some(length) => bytes = &bytes[length..],
                    None => {
                        self.open.extend_from_slice(bytes);
                        return Ok(());
                    }
                }
                continue;
            }
            let need = needed(&self.open)?;
            let take = (need - self.open.len()).min(bytes.len());
            self.open.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if whole_chunk(&self.open)?.is_some() {
                self.open.clear();
            }
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        if self.open.is_empty() {
            return Ok(());
        }
        Err(Error::new(ErrorCode::Corrupt, format!("a partition ends inside a chunk ({} bytes left)", self.open.len())))
    }
}

/// Bytes of the chunk that `bytes` starts with, or of its header if that is not complete.
fn needed(bytes: &[u8]) -> Result<usize> {
    match bytes.first_chunk::<CHUNK_HEADER_BYTES>() {
        None => Ok(CHUNK_HEADER_BYTES),
        Some(header) => Ok(CHUNK_HEADER_BYTES + ChunkHeader::decode(header)?.stored_len as usize),
    }
}

/// Checks the chunk at the start of `bytes` if all of it is there; returns its length.
fn whole_chunk(bytes: &[u8]) -> Result<Option<usize>> {
    let Some(header) = bytes.first_chunk::<CHUNK_HEADER_BYTES>() else { return Ok(None) };
    let header = ChunkHeader::decode(header)?;
    let end = CHUNK_HEADER_BYTES + header.stored_len as usize;
    let Some(stored) = bytes.get(CHUNK_HEADER_BYTES..end) else { return Ok(None) };
    header.verify(stored)?;
    Ok(Some(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunks() -> Vec<u8> {
        let mut out = Vec::new();
        for length in [1usize, 50, 300] {
            let stored = vec![length as u8; length];
            out.extend_from_slice(&ChunkHeader::encode(false, length, &stored));
            out.extend_from_slice(&stored);
        }
        out
    }

    #[test]
    fn chunks_verify_however_they_are_cut() {
        let bytes = chunks();
        for step in [1, 3, 15, 16, 17, 100, 1_000] {
            let mut verifier = Verifier::default();
            for piece in bytes.chunks(step) {
                verifier.push(piece).unwrap();
            }
            verifier.finish().unwrap();
        }
    }

    #[test]
    fn damage_and_cuts_are_noticed() {
        let bytes = chunks();
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 4;
            let mut verifier = Verifier::default();
            let checked = bad.chunks(7).try_for_each(|piece| verifier.push(piece)).and_then(|()| verifier.finish());
            assert_eq!(checked.unwrap_err().code(), ErrorCode::Corrupt, "byte {at}");
        }
        let mut verifier = Verifier::default();
        verifier.push(&bytes[..bytes.len() - 1]).unwrap();
        assert!(verifier.finish().is_err());
    }
}
