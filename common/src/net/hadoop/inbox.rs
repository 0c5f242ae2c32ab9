//! What a client sends, cut into frames.

use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::frame::Fatal;

/// Frames up to this come many at a time; kept per connection.
const BUFFER_BYTES: usize = 8 << 10;
/// A larger frame is read in steps, so that memory comes with bytes, not with claims.
const READ_STEP: usize = 64 << 10;
/// Before each frame.
const LENGTH_BYTES: usize = 4;

/// What the bytes that were read start with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Next {
    /// A frame, without its length.
    Frame(Bytes),
    /// A frame that must wait for room.
    Large,
    /// A part of a frame.
    Part,
    /// Nothing.
    Nothing,
}

/// Reads frames; holds one of more than [`BUFFER_BYTES`], or as many small ones as fit into that.
pub struct Inbox<R> {
    reader: R,
    buffer: BytesMut,
}

impl<R: AsyncRead + Unpin> Inbox<R> {
    /// From a connection whose next byte starts a frame.
    pub fn new(reader: R) -> Self {
        Self { reader, buffer: BytesMut::new() }
    }

    /// The connection, to be drained at its end.
    pub fn into_reader(self) -> R {
        self.reader
    }

    fn length(&self) -> Option<usize> {
        self.buffer.first_chunk().map(|length| u32::from_be_bytes(*length) as usize)
    }

    /// Takes the next frame if all of it is there and it has at most `room` bytes.
    ///
    /// # Errors
    /// It is longer than `most` bytes.
    pub fn take(&mut self, most: usize, room: usize) -> Result<Next, Fatal> {
        while self.length() == Some(0) {
            // Very old pings.
            self.buffer.advance(LENGTH_BYTES);
        }
        let Some(length) = self.length() else {
            return Ok(if self.buffer.is_empty() { Next::Nothing } else { Next::Part });
        };
        if length > most {
            let message = format!("a request of {length} bytes is longer than the limit of {most}");
            return Err(Fatal::bad_frame(message));
        }
        if length > room {
            return Ok(Next::Large);
        }
        let Some(frame) = self.buffer.get(LENGTH_BYTES..LENGTH_BYTES + length) else { return Ok(Next::Part) };
        if length <= BUFFER_BYTES - LENGTH_BYTES {
            // A copy: else a small call would hold the whole buffer.
            let frame = Bytes::copy_from_slice(frame);
            self.buffer.advance(LENGTH_BYTES + length);
            return Ok(Next::Frame(frame));
        }
        // Nothing is read beyond the end of a large one.
        let mut frame = std::mem::take(&mut self.buffer).freeze();
        frame.advance(LENGTH_BYTES);
        Ok(Next::Frame(frame))
    }

    /// Reads once, after [`Self::take`] found nothing or a part; 0 bytes: the client left. Nothing is lost when it is dropped.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn fill(&mut self) -> io::Result<usize> {
        let have = self.buffer.len();
        let need = LENGTH_BYTES + self.length().unwrap_or(0);
        let step = need.max(BUFFER_BYTES).saturating_sub(have).clamp(1, READ_STEP);
        self.buffer.reserve(step);
        self.reader.read_buf(&mut (&mut self.buffer).limit(step)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: usize = 1 << 20;

    fn framed(bodies: &[Vec<u8>]) -> Vec<u8> {
        bodies.iter().flat_map(|body| [&(body.len() as u32).to_be_bytes()[..], body].concat()).collect()
    }

    /// All frames of a stream, and how often it was read from.
    async fn all(reader: impl AsyncRead + Unpin) -> (Vec<Bytes>, usize) {
        let (mut inbox, mut frames, mut reads) = (Inbox::new(reader), Vec::new(), 0);
        loop {
            match inbox.take(MOST, MOST).unwrap() {
                Next::Frame(frame) => frames.push(frame),
                Next::Part | Next::Nothing if inbox.fill().await.unwrap() > 0 => reads += 1,
                _ => return (frames, reads),
            }
        }
    }

    #[tokio::test]
    async fn small_frames_come_with_one_read() {
        let bodies = [vec![1; 100], vec![2; 1], vec![], vec![3; 300]];
        let (frames, reads) = all(&framed(&bodies)[..]).await;
        assert_eq!((frames, reads), ([&bodies[..2], &bodies[3..]].concat().into_iter().map(Bytes::from).collect(), 1));
    }

    #[tokio::test]
    async fn a_large_frame_between_small_ones_is_whole_and_leaves_no_large_buffer() {
        for large in [BUFFER_BYTES - 4, BUFFER_BYTES - 3, BUFFER_BYTES, READ_STEP * 3 + 17] {
            let bodies = [vec![1; 100], vec![2; large], vec![3; 5]];
            let (frames, _) = all(&framed(&bodies)[..]).await;
            assert!(frames == bodies, "{large}");
        }
        let bytes = framed(&[vec![2; READ_STEP * 3], vec![3; 5]]);
        let mut inbox = Inbox::new(&bytes[..]);
        let large = loop {
            if let Next::Frame(frame) = inbox.take(MOST, MOST).unwrap() {
                break frame;
            }
            inbox.fill().await.unwrap();
            assert!(inbox.buffer.capacity() <= 2 * (inbox.buffer.len() + READ_STEP), "memory comes with bytes");
        };
        assert_eq!((large.len(), inbox.buffer.capacity()), (READ_STEP * 3, 0));
    }

    #[tokio::test]
    async fn a_stream_comes_through_in_any_pieces() {
        let bodies = [vec![1; 100], vec![2; 1], vec![3; BUFFER_BYTES + 1], vec![4; 300]];
        let bytes = framed(&bodies);
        for piece in [1, 2, 3, 5, 103, 104, 105, BUFFER_BYTES] {
            let (mut client, server) = tokio::io::duplex(piece);
            let send = async {
                tokio::io::AsyncWriteExt::write_all(&mut client, &bytes).await.unwrap();
                drop(client);
            };
            let ((), (frames, _)) = tokio::join!(send, all(server));
            assert!(frames == bodies, "{piece}");
        }
    }

    #[tokio::test]
    async fn what_is_too_long_is_refused_and_what_has_no_room_waits() {
        let bytes = framed(&[vec![1; 100]]);
        let mut inbox = Inbox::new(&bytes[..]);
        assert_eq!(inbox.take(MOST, MOST), Ok(Next::Nothing));
        inbox.fill().await.unwrap();
        assert!(inbox.take(99, MOST).is_err());
        assert_eq!(inbox.take(MOST, 99), Ok(Next::Large));
        assert_eq!(inbox.take(MOST, 100), Ok(Next::Frame(Bytes::from(vec![1; 100]))));
        assert_eq!(inbox.take(MOST, MOST), Ok(Next::Nothing));
    }
}
