//! What the tests of several readers share.

use bytes::Bytes;

use super::Result;
use super::input::Feed;

/// Bytes that come in pieces of `step`.
pub struct Pieces {
    head: Option<Bytes>,
    rest: Bytes,
    step: usize,
}

impl Pieces {
    /// All of `bytes`.
    pub fn of(bytes: &[u8], step: usize) -> Self {
        Self { head: None, rest: Bytes::copy_from_slice(bytes), step }
    }

    /// `head` as one piece before the others.
    pub fn after(self, head: &[u8]) -> Self {
        Self { head: Some(Bytes::copy_from_slice(head)), ..self }
    }
}

impl Feed for Pieces {
    fn next(&mut self) -> Result<Option<Bytes>> {
        if let Some(head) = self.head.take() {
            return Ok(Some(head));
        }
        let step = self.step.min(self.rest.len());
        Ok((step > 0).then(|| self.rest.split_to(step)))
    }
}
