//! `OPEN`: a range of a file as the body of an answer.

use cairn_common::net::http::{self, Answer, Bytes};
use cairn_proto::webhdfs;
use futures_util::stream;

use super::Call;
use crate::fs::{Error, ErrorCode, FileReader, Result};

const KIND: &str = "application/octet-stream";

/// The file from `offset` on, `length` bytes at most. The first bytes are there before the answer begins: a file that cannot be read is an error,
/// not an answer that breaks off.
pub async fn open(call: Call) -> Result<Answer> {
    let offset = call.parameters.number("offset")?.unwrap_or(0);
    let length = call.parameters.number("length")?.unwrap_or(u64::MAX);
    let mut reader = call.reader().await?;
    let whole = reader.length();
    webhdfs::check_offset(&call.path, offset, whole)?;
    let left = length.min(whole - offset);
    reader.seek(offset);
    reader.limit_read_ahead(offset + left);
    let mut range = Range { reader, left, ready: None, turn: call.turn };
    range.ready = range.next().await?;
    let pieces = stream::unfold(Some(range), |range| async move {
        let mut range = range?;
        match range.next().await {
            Ok(Some(piece)) => Some((Ok(piece), Some(range))),
            Ok(None) => None,
            Err(error) => {
                tracing::warn!(path = range.reader.path(), %error, "a WebHDFS read broke off");
                Some((Err(error), None))
            }
        }
    });
    Ok(http::stream(KIND, Some(left), pieces))
}

/// What is still to be sent.
struct Range {
    reader: FileReader,
    left: u64,
    ready: Option<Bytes>,
    #[allow(dead_code, reason = "held as long as the range")]
    turn: super::turns::Turn,
}

impl Range {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        if let Some(ready) = self.ready.take() {
            return Ok(Some(ready));
        }
        if self.left == 0 {
            return Ok(None);
        }
        let Some(mut piece) = self.reader.next_chunk().await? else {
            let text = format!("{} ended {} bytes early", self.reader.path(), self.left);
            return Err(Error::new(ErrorCode::Internal, text));
        };
        piece.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
        self.left -= piece.len() as u64;
        Ok(Some(piece))
    }
}
