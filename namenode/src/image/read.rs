//! Reads images, and checks every byte on the way.

use std::path::{Path, PathBuf};

use cairn_common::durable::{File, Fs, OpenMode};
use cairn_common::work::Work;
use cairn_proto::ids::TxId;

use super::format::{
    HEADER_BYTES, ImageHeader, SECTION_BYTES, Section, TRAILER_BYTES, TRAILER_MAGIC, Trailer, VERSION, page_digest,
    parse_image_name,
};
use crate::journal::LogError;

/// An image in a folder.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageFile {
    /// The transaction whose state it is.
    pub txid: TxId,
    /// Its file.
    pub path: PathBuf,
    /// Bytes.
    pub len: u64,
}

/// What a whole image told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageFacts {
    /// The transaction whose state it is.
    pub header: ImageHeader,
    /// Pages.
    pub pages: u64,
    /// Digest over the pages.
    pub digest: u64,
    /// Bytes of the file.
    pub bytes: u64,
}

/// The images in a folder, newest first. Other files are left alone.
pub fn list_images(fs: &dyn Fs, folder: &Path) -> Result<Vec<ImageFile>, LogError> {
    let mut images = Vec::new();
    for entry in fs.read_dir(folder).map_err(LogError::io("list", folder))? {
        if let Some(txid) = parse_image_name(&entry.name).filter(|_| !entry.is_dir) {
            images.push(ImageFile { txid, path: folder.join(&entry.name), len: entry.len });
        }
    }
    images.sort_by_key(|image| std::cmp::Reverse(image.txid));
    Ok(images)
}

/// Removes what a checkpoint that did not end has left.
pub fn remove_leftovers(fs: &dyn Fs, folder: &Path) -> Result<(), LogError> {
    for entry in fs.read_dir(folder).map_err(LogError::io("list", folder))? {
        if !entry.is_dir && entry.name.starts_with("image_") && entry.name.ends_with(".tmp") {
            let path = folder.join(&entry.name);
            fs.remove_file(&path).map_err(LogError::io("remove", &path))?;
        }
    }
    Ok(())
}

/// Pages that are unpacked at a time: enough to keep every core busy, few enough to hold in memory.
const BATCH: usize = 256;

/// Reads the image at `path` and gives each page to `visit`, which may refuse it with a reason. A page is given before the
/// whole image is verified: what was made of the pages counts only if this returns `Ok`.
pub fn read_image(
    fs: &dyn Fs,
    path: &Path,
    cluster_id: &str,
    mut visit: impl FnMut(&[u8]) -> Result<(), String>,
) -> Result<ImageFacts, LogError> {
    let file = fs.open(path, OpenMode::Read).map_err(LogError::io("open", path))?;
    read_open_image(&*file, path, cluster_id, &mut visit)
}

/// As [`read_image`], of a file that is open already and may have lost its name meanwhile.
pub fn read_open_image(
    file: &dyn File,
    path: &Path,
    cluster_id: &str,
    visit: &mut dyn FnMut(&[u8]) -> Result<(), String>,
) -> Result<ImageFacts, LogError> {
    let mut page = Vec::new();
    read_batches(file, path, cluster_id, 1, |batch| {
        let mut digest = 0u64;
        for stored in &batch {
            stored.unpack(path, &mut page)?;
            digest = digest.wrapping_add(page_digest(&page));
            visit(&page).map_err(|what| stored.damaged(path, &what))?;
        }
        Ok(digest)
    })
}

/// As [`read_image`], but pages are unpacked and given to `decode` on several threads; what it makes of them goes to `take`, in
/// order.
pub fn read_image_on<D: Send>(
    fs: &dyn Fs,
    work: &Work,
    path: &Path,
    cluster_id: &str,
    decode: impl Fn(&[u8]) -> Result<D, String> + Sync,
    mut take: impl FnMut(D) -> Result<(), String>,
) -> Result<ImageFacts, LogError> {
    let threads = cairn_common::process::cores().max(1);
    let file = fs.open(path, OpenMode::Read).map_err(LogError::io("open", path))?;
    read_batches(&*file, path, cluster_id, BATCH, |batch| {
        let share = batch.len().div_ceil(threads).max(1);
        let mut parts: Vec<Vec<Stored>> = Vec::new();
        for stored in batch {
            match parts.last_mut().filter(|part| part.len() < share) {
                Some(part) => part.push(stored),
                None => parts.push(vec![stored]),
            }
        }
        let decoded = work.each(parts, |part| {
            let mut page = Vec::new();
            let mut all = Vec::with_capacity(part.len());
            for stored in part {
                stored.unpack(path, &mut page)?;
                let made = decode(&page).map_err(|what| stored.damaged(path, &what))?;
                all.push((page_digest(&page), made, stored));
            }
            Ok(all)
        });
        let mut digest = 0u64;
        for part in decoded {
            for (page_digest, made, stored) in part? {
                digest = digest.wrapping_add(page_digest);
                take(made).map_err(|what| stored.damaged(path, &what))?;
            }
        }
        Ok(digest)
    })
}

/// Reads the frame of an image; `visit` takes up to `most` pages at a time and returns the sum of their digests.
fn read_batches(
    file: &dyn File,
    path: &Path,
    cluster_id: &str,
    most: usize,
    mut visit: impl FnMut(Vec<Stored>) -> Result<u64, LogError>,
) -> Result<ImageFacts, LogError> {
    let length = file.len().map_err(LogError::io("measure", path))?;
    if length < (HEADER_BYTES + TRAILER_BYTES) as u64 {
        return Err(LogError::damaged_image(path, length, "the image ends early"));
    }
    let mut reader = Reader { file, path, length, at: 0, crc: 0 };
    let mut header = [0; HEADER_BYTES];
    reader.take(&mut header)?;
    let header = check_header(path, &header, cluster_id)?;
    let (mut pages, mut digest) = (0, 0u64);
    loop {
        let mut batch = Vec::new();
        while batch.len() < most {
            let Some(stored) = reader.next_page(pages)? else { break };
            batch.push(stored);
            pages += 1;
        }
        if batch.is_empty() {
            break;
        }
        digest = digest.wrapping_add(visit(batch)?);
    }
    let (at, crc) = (reader.at, reader.crc);
    let mut trailer = [0; TRAILER_BYTES];
    reader.take(&mut trailer)?;
    let damaged = |what: &str| LogError::damaged_image(path, at, what);
    let trailer = Trailer::decode(&trailer, crc).map_err(damaged)?;
    let expected = Trailer { pages, digest, txid: header.txid, file_bytes: length };
    if trailer != expected || reader.at != length {
        return Err(damaged("the trailer does not fit the pages"));
    }
    Ok(ImageFacts { header, pages, digest, bytes: length })
}

/// A page as it lies in the file.
struct Stored {
    number: u64,
    at: u64,
    section: Section,
    bytes: Vec<u8>,
}

impl Stored {
    fn damaged(&self, path: &Path, what: &str) -> LogError {
        LogError::damaged_image(path, self.at, format!("page {}: {what}", self.number))
    }

    /// Checks and decompresses it.
    fn unpack(&self, path: &Path, page: &mut Vec<u8>) -> Result<(), LogError> {
        if Section::checksum(self.number, self.section.raw, &self.bytes) != self.section.crc {
            return Err(self.damaged(path, "its checksum differs"));
        }
        page.resize(self.section.raw, 0);
        let size = zstd::bulk::decompress_to_buffer(&self.bytes, &mut page[..]);
        if size.ok() != Some(self.section.raw) {
            return Err(self.damaged(path, "it does not decompress to its length"));
        }
        Ok(())
    }
}

fn check_header(path: &Path, bytes: &[u8; HEADER_BYTES], cluster_id: &str) -> Result<ImageHeader, LogError> {
    let header = match ImageHeader::decode(bytes) {
        Ok(Ok(header)) => header,
        Ok(Err(what)) => return Err(LogError::damaged_image(path, 0, what)),
        Err(found) => return Err(LogError::Newer { path: path.to_owned(), found, known: VERSION }),
    };
    if header.cluster_id != cluster_id {
        let (found, expected) = (header.cluster_id, cluster_id.to_owned());
        return Err(LogError::OtherCluster { path: path.to_owned(), found, expected });
    }
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    // The writer verifies a file before it has its name, so only a name of ours is compared.
    if parse_image_name(&name).is_some_and(|txid| txid != header.txid) {
        let what = format!("the image is of transaction {}, not of the one in its name", header.txid);
        return Err(LogError::damaged_image(path, 16, what));
    }
    Ok(header)
}

struct Reader<'a> {
    file: &'a dyn File,
    path: &'a Path,
    length: u64,
    at: u64,
    crc: u32,
}

impl Reader<'_> {
    /// The next page, which is the one with this number; `None`: the trailer comes.
    fn next_page(&mut self, number: u64) -> Result<Option<Stored>, LogError> {
        let at = self.at;
        let mut head = [0; SECTION_BYTES];
        self.peek(&mut head[..4])?;
        if &head[..4] == TRAILER_MAGIC {
            return Ok(None);
        }
        self.take(&mut head)?;
        let damaged = |what: &str| LogError::damaged_image(self.path, at, format!("page {number}: {what}"));
        let section = Section::decode(&head).ok_or_else(|| damaged("its head is damaged"))?;
        if section.stored as u64 > self.length - self.at {
            return Err(damaged("it ends behind the end of the file"));
        }
        let mut bytes = vec![0; section.stored];
        self.take(&mut bytes)?;
        Ok(Some(Stored { number, at, section, bytes }))
    }

    fn peek(&self, out: &mut [u8]) -> Result<(), LogError> {
        if self.at + out.len() as u64 > self.length {
            return Err(LogError::damaged_image(self.path, self.at, "the image ends early"));
        }
        self.file.read_exact_at(out, self.at).map_err(LogError::io("read", self.path))
    }

    fn take(&mut self, out: &mut [u8]) -> Result<(), LogError> {
        self.peek(out)?;
        self.at += out.len() as u64;
        self.crc = crc32c::crc32c_append(self.crc, out);
        Ok(())
    }
}
