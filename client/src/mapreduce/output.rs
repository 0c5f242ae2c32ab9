//! The text that a reducer (or a mapper of a job without reducers) writes.

use bytes::Bytes;
use cairn_proto::Result;

const PIECE_BYTES: usize = 512 << 10;

/// Takes pieces of output text, in order.
pub type Sink = Box<dyn FnMut(Bytes) -> Result<()> + Send>;

/// Lines of text on their way to a file.
pub struct Output {
    buffer: Vec<u8>,
    sink: Sink,
    records: u64,
    bytes: u64,
}

impl Output {
    /// Writes to `sink` in pieces of about half a megabyte.
    pub fn new(sink: Sink) -> Self {
        Self { buffer: Vec::new(), sink, records: 0, bytes: 0 }
    }

    /// Writes `key`, a tab, `value`, a line feed.
    #[inline]
    pub fn emit(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        self.buffer.extend_from_slice(key);
        self.buffer.push(b'\t');
        self.line(value)
    }

    /// Writes `key`, a tab, the number, a line feed.
    #[inline]
    pub fn emit_count(&mut self, key: &[u8], count: u64) -> Result<()> {
        let mut digits = [0; 20];
        let mut at = digits.len();
        let mut rest = count;
        loop {
            at -= 1;
            digits[at] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        self.emit(key, &digits[at..])
    }

    /// Writes a line.
    #[inline]
    pub fn line(&mut self, line: &[u8]) -> Result<()> {
        self.buffer.extend_from_slice(line);
        self.buffer.push(b'\n');
        self.records += 1;
        if self.buffer.len() >= PIECE_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        self.bytes += self.buffer.len() as u64;
        let piece = std::mem::replace(&mut self.buffer, Vec::with_capacity(PIECE_BYTES + 4096));
        (self.sink)(Bytes::from(piece))
    }

    /// Hands out the rest; returns records and bytes written in all.
    pub fn finish(mut self) -> Result<(u64, u64)> {
        self.flush()?;
        Ok((self.records, self.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn lines_come_out_in_order() {
        let (send, receive) = mpsc::sync_channel(100);
        let mut out = Output::new(Box::new(move |piece| {
            send.send(piece).unwrap();
            Ok(())
        }));
        let mut want = Vec::new();
        for i in (0..100_000u64).chain([u64::MAX]) {
            out.emit_count(b"key", i).unwrap();
            want.extend_from_slice(format!("key\t{i}\n").as_bytes());
        }
        assert_eq!(out.finish().unwrap(), (100_001, want.len() as u64));
        let pieces: Vec<Bytes> = receive.iter().collect();
        assert!(pieces.len() > 1);
        assert_eq!(pieces.concat(), want);
    }
}
