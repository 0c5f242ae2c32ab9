//! What files hold, for those who plan by it: decompressed where their names say so.

use bytes::Bytes;
use cairn_proto::Result;

use crate::fs::{FileStatus, FileSystem};
use crate::mapreduce::Compression;
use crate::mapreduce::input::{Decompress, Feed};

struct Once(Option<Bytes>);

impl Feed for Once {
    fn next(&mut self) -> Result<Option<Bytes>> {
        Ok(self.0.take())
    }
}

/// The content in the first `length` bytes of a file; more than that if it is compressed.
pub(super) async fn start_of(fs: &FileSystem, file: &FileStatus, length: u64) -> Result<Bytes> {
    let reader = fs.open(&file.path).await?;
    let stored = reader.read_range(0, length.min(reader.length())).await?;
    let Some(kind) = Compression::of(&file.path) else { return Ok(stored) };
    let (path, whole) = (file.path.clone(), length >= reader.length());
    fs.env().work.cpu(move || decompress(kind, &path, stored, whole)).await
}

/// `whole`: damage is an error; else the data end somewhere, and what comes before that is taken.
fn decompress(kind: Compression, path: &str, stored: Bytes, whole: bool) -> Result<Bytes> {
    let mut content = Decompress::new(kind, path.into(), Box::new(Once(Some(stored))))?;
    let mut out = Vec::new();
    loop {
        match content.next() {
            Ok(Some(piece)) => out.extend_from_slice(&piece),
            Ok(None) => return Ok(out.into()),
            Err(_) if !whole && !out.is_empty() => return Ok(out.into()),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_read_as_far_as_it_goes() {
        let content: Vec<u8> =
            (0..100_000u32).flat_map(|i| format!("{}\n", i.wrapping_mul(77_777)).into_bytes()).collect();
        let file = zstd::encode_all(&content[..], 1).unwrap();
        let start = Bytes::copy_from_slice(&file[..file.len() / 2]);
        let got = decompress(Compression::Zstd, "/f.zst", start.clone(), false).unwrap();
        assert!(got.len() > 100_000 && content.starts_with(&got), "{}", got.len());
        assert!(decompress(Compression::Zstd, "/f.zst", start, true).is_err());
        assert!(decompress(Compression::Zstd, "/f.zst", content.into(), false).is_err());
    }
}
