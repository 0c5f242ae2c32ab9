//! A backup as a stream of pieces.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use cairn_common::durable::{File, Fs, OpenMode};
use cairn_proto::backupfile::{BackupEncoder, BackupHeader, SectionKind};
use cairn_proto::ids::{Epoch, TxId};
use cairn_proto::{Error, ErrorCode, Result};

use crate::image::{list_images, read_open_image};
use crate::journal::format::{HEADER_BYTES, SegmentHeader, record_at};
use crate::journal::{LogError, MAX_SEGMENT_BYTES, MetaDir, list_segments};

/// Bytes of a piece.
const PIECE_BYTES: usize = 1 << 20;
/// A checkpoint may remove files between the listing and the opening: then both are done again.
const ATTEMPTS: usize = 5;

/// What to back up.
pub struct BackupPlan {
    /// The metadata directories in use; each holds everything.
    pub dirs: Vec<Arc<MetaDir>>,
    /// The last durable transaction: the backup's last.
    pub last: TxId,
    /// The epoch.
    pub epoch: Epoch,
    /// Now, milliseconds since 1970.
    pub made_ms: u64,
    /// The cluster.
    pub cluster_id: String,
    /// Its block pool.
    pub pool_id: String,
}

struct Opened {
    number: TxId,
    path: PathBuf,
    file: Arc<dyn File>,
}

/// Where the log has got to while it is read.
struct At {
    last: TxId,
    chain: Option<u32>,
}

/// The contents of the section that is being sent.
enum Contents {
    File { file: Arc<dyn File>, path: PathBuf, at: u64, length: u64 },
    Bytes { bytes: Vec<u8>, at: usize },
}

/// A backup under way. All its files are open from the beginning, so that what a checkpoint purges meanwhile stays readable
/// until the backup is done: log and images are pinned by their descriptors.
pub struct BackupSource {
    header: BackupHeader,
    encoder: Option<BackupEncoder>,
    image: Option<Opened>,
    log: VecDeque<Opened>,
    contents: Option<Contents>,
    at: At,
    begun: bool,
}

impl BackupSource {
    /// Opens the older image and the log since, from the first directory that has them whole. Blocking.
    pub fn open(fs: &dyn Fs, plan: &BackupPlan) -> Result<Self> {
        let mut first_error = None;
        for dir in &plan.dirs {
            match Self::open_in(fs, plan, dir) {
                Ok(source) => return Ok(source),
                Err(error) => first_error.get_or_insert(error),
            };
        }
        Err(first_error.unwrap_or_else(|| Error::new(ErrorCode::Io, "no metadata directory is in use")))
    }

    fn open_in(fs: &dyn Fs, plan: &BackupPlan, dir: &MetaDir) -> Result<Self> {
        let mut attempts = ATTEMPTS;
        let (images, segments) = loop {
            attempts -= 1;
            match open_all(fs, dir) {
                Err(LogError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound && attempts > 0 => {}
                other => break other?,
            }
        };
        let image = choose_image(images, &plan.cluster_id)?;
        let from = image.as_ref().map_or(TxId(1), |image| image.number.next());
        let Some(first) = segments.iter().rposition(|segment| segment.number <= from) else {
            let text =
                format!("{} does not reach back to transaction {from}: no backup can be made", dir.log().display());
            return Err(Error::new(ErrorCode::Corrupt, text).with_subject(dir.log().display().to_string()));
        };
        // A checkpoint may have ended since the caller looked.
        let last = image.as_ref().map_or(plan.last, |image| plan.last.max(image.number));
        let header = BackupHeader {
            image: image.as_ref().map_or(TxId(0), |image| image.number),
            last,
            epoch: plan.epoch,
            made_ms: plan.made_ms,
            cluster_id: plan.cluster_id.clone(),
            pool_id: plan.pool_id.clone(),
        };
        let at = At { last: TxId(segments[first].number.0.saturating_sub(1)), chain: None };
        let log = segments.into_iter().skip(first).take_while(|segment| segment.number <= last.next()).collect();
        Ok(Self { header, encoder: Some(BackupEncoder::default()), image, log, contents: None, at, begun: false })
    }

    /// The transaction of its image; 0: it holds the log from the beginning.
    pub fn image(&self) -> TxId {
        self.header.image
    }

    /// The next piece; `None` after the trailer. Blocking. After an error the backup is worth nothing.
    pub fn next_piece(&mut self) -> Result<Option<Vec<u8>>> {
        let Some(mut encoder) = self.encoder.take() else { return Ok(None) };
        let mut out = Vec::new();
        if !self.begun {
            self.begun = true;
            out.extend(encoder.header(&self.header));
        }
        while out.len() < PIECE_BYTES {
            if self.contents.is_none() && !self.begin_section(&mut encoder, &mut out)? {
                if self.at.last < self.header.last {
                    let text =
                        format!("the log ends with transaction {}, {} was durable", self.at.last, self.header.last);
                    return Err(Error::new(ErrorCode::Corrupt, text));
                }
                out.extend(encoder.trailer());
                return Ok(Some(out));
            }
            if self.copy_some(&mut encoder, &mut out)? {
                self.contents = None;
                out.extend(encoder.end());
            }
        }
        self.encoder = Some(encoder);
        Ok(Some(out))
    }

    /// `false`: there is none left.
    fn begin_section(&mut self, encoder: &mut BackupEncoder, out: &mut Vec<u8>) -> Result<bool> {
        if let Some(Opened { number, path, file }) = self.image.take() {
            let length = file.len().map_err(LogError::io("measure", &path))?;
            out.extend(encoder.begin(SectionKind::Image, number, length));
            self.contents = Some(Contents::File { file, path, at: 0, length });
            return Ok(true);
        }
        let Some(segment) = self.log.pop_front() else { return Ok(false) };
        let bytes = self.read_segment(&segment)?;
        out.extend(encoder.begin(SectionKind::Log, segment.number, bytes.len() as u64));
        self.contents = Some(Contents::Bytes { bytes, at: 0 });
        Ok(true)
    }

    /// The header and the records of a segment up to the backup's last transaction; a log with a gap is not backed up.
    fn read_segment(&mut self, segment: &Opened) -> Result<Vec<u8>> {
        let (path, last) = (&segment.path, self.header.last);
        let length = segment.file.len().map_err(LogError::io("measure", path))?;
        if length > MAX_SEGMENT_BYTES {
            return Err(LogError::damaged(path, 0, format!("the segment has {length} bytes")).into());
        }
        let mut bytes = vec![0; length as usize];
        segment.file.read_exact_at(&mut bytes, 0).map_err(LogError::io("read", path))?;
        let header = SegmentHeader::decode(&bytes).map_err(|fault| {
            LogError::damaged(path, 0, format!("the header of the segment is not usable: {fault:?}"))
        })?;
        let continues = self.at.chain.is_none_or(|chain| chain == header.chain);
        if header.first != self.at.last.next() || header.cluster_id != self.header.cluster_id || !continues {
            let what = format!("the segment does not continue transaction {}", self.at.last);
            return Err(LogError::damaged(path, 0, what).into());
        }
        let (mut at, mut chain) = (HEADER_BYTES, header.chain);
        while self.at.last < last {
            let Some(record) = record_at(&bytes, at) else { break };
            if record.txid != self.at.last.next() || record.previous_crc != chain {
                let what = format!("the record does not continue transaction {}", self.at.last);
                return Err(LogError::damaged(path, at as u64, what).into());
            }
            (at, chain, self.at.last) = (record.end, record.crc, record.txid);
        }
        self.at.chain = Some(chain);
        bytes.truncate(at);
        Ok(bytes)
    }

    /// Sends a part of the section's contents; `true`: that was all.
    fn copy_some(&mut self, encoder: &mut BackupEncoder, out: &mut Vec<u8>) -> Result<bool> {
        let room = PIECE_BYTES.saturating_sub(out.len()).max(1);
        let start = out.len();
        let done = match &mut self.contents {
            None => true,
            Some(Contents::Bytes { bytes, at }) => {
                let end = bytes.len().min(*at + room);
                out.extend_from_slice(&bytes[*at..end]);
                *at = end;
                end == bytes.len()
            }
            Some(Contents::File { file, path, at, length }) => {
                let now = (*length - *at).min(room as u64);
                out.resize(start + now as usize, 0);
                file.read_exact_at(&mut out[start..], *at).map_err(LogError::io("read", path))?;
                *at += now;
                at == length
            }
        };
        encoder.contents(&out[start..]);
        Ok(done)
    }
}

/// Images (newest first) and segments of a directory, open.
fn open_all(fs: &dyn Fs, dir: &MetaDir) -> Result<(Vec<Opened>, Vec<Opened>), LogError> {
    let open = |(number, path): (TxId, PathBuf)| {
        let file = fs.open(&path, OpenMode::Read).map_err(LogError::io("open", &path))?;
        Ok::<Opened, LogError>(Opened { number, path, file })
    };
    let images = list_images(fs, &dir.image())?.into_iter().map(|image| open((image.txid, image.path)));
    let images = images.collect::<Result<Vec<_>, _>>()?;
    // After the images: a checkpoint purges log only when a newer image is there, and these are kept open.
    let segments = list_segments(fs, &dir.log())?.into_iter().map(|segment| open((segment.first, segment.path)));
    Ok((images, segments.collect::<Result<Vec<_>, _>>()?))
}

/// The older image that verifies, else the newer; `None`: there is none, the log goes back to the beginning.
fn choose_image(images: Vec<Opened>, cluster_id: &str) -> Result<Option<Opened>> {
    let mut first_error = None;
    let mut newest_two: Vec<Opened> = images.into_iter().take(2).collect();
    while let Some(image) = newest_two.pop() {
        match read_open_image(&*image.file, &image.path, cluster_id, &mut |_| Ok(())) {
            Ok(_) => return Ok(Some(image)),
            Err(error) => {
                tracing::error!(%error, "image not usable for a backup; trying the newer one");
                first_error.get_or_insert(error);
            }
        }
    }
    first_error.map_or(Ok(None), |error| Err(error.into()))
}
