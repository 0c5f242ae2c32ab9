//! Bytes as a source of choices, and seeded mutations of valid inputs.

use cairn_common::entropy::Entropy;

/// Takes choices from bytes; gives zeros when they are used up.
pub struct Input<'a> {
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    /// From the start of `data`.
    pub fn new(data: &'a [u8]) -> Self {
        Self { rest: data }
    }

    /// Whether all is used up.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// What is left.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// One byte.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.rest.split_first() else { return 0 };
        self.rest = rest;
        *first
    }

    /// Two bytes.
    pub fn short(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// Yes or no.
    pub fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    /// Up to `most` bytes.
    pub fn take(&mut self, most: usize) -> &'a [u8] {
        let (taken, rest) = self.rest.split_at(most.min(self.rest.len()));
        self.rest = rest;
        taken
    }

    /// One of these.
    pub fn pick<'b, T>(&mut self, choices: &'b [T]) -> &'b T {
        &choices[usize::from(self.byte()) % choices.len()]
    }

    /// A number: mostly small, sometimes on an edge, sometimes anything.
    pub fn number(&mut self) -> u64 {
        match self.byte() {
            small @ 0..200 => u64::from(small % 40),
            200..220 => u64::from(self.short()),
            edge @ 220..245 => EDGES[usize::from(edge) % EDGES.len()],
            _ => {
                let mut bytes = [0; 8];
                let taken = self.take(8);
                bytes[..taken.len()].copy_from_slice(taken);
                u64::from_le_bytes(bytes)
            }
        }
    }
}

/// Numbers at which programs break.
pub const EDGES: [u64; 16] = [
    0,
    1,
    127,
    512,
    0xFFFF,
    0x1_0000,
    (1 << 31) - 1,
    1 << 31,
    u32::MAX as u64,
    1 << 32,
    16 << 30,
    (1 << 62) - 1,
    i64::MAX as u64,
    1 << 63,
    u64::MAX - 1,
    u64::MAX,
];

/// One of `seeds`, changed in one to four ways.
pub fn mutated(seeds: &[Vec<u8>], entropy: &Entropy) -> Vec<u8> {
    let pick = || seeds[entropy.below(seeds.len() as u64) as usize].clone();
    let mut data = pick();
    for _ in 0..=entropy.below(4) {
        mutate(&mut data, &pick(), entropy);
    }
    data.truncate(64 << 10);
    data
}

fn mutate(data: &mut Vec<u8>, other: &[u8], entropy: &Entropy) {
    let within = |length: usize| entropy.below(length as u64 + 1) as usize;
    let at = within(data.len());
    let length = within(32).min(data.len() - at);
    match entropy.below(11) {
        0 | 1 if at < data.len() => data[at] ^= 1 << entropy.below(8),
        2 if at < data.len() => data[at] = entropy.next_u64() as u8,
        3 => data.truncate(at),
        4 => drop(data.drain(at..at + length)),
        5 => {
            let piece = data[at..at + length].to_vec();
            data.splice(at..at, piece);
        }
        6 => {
            let mut noise = vec![0; within(48)];
            entropy.fill(&mut noise);
            data.splice(at..at, noise);
        }
        7 => data[at..at + length].fill(0),
        8 if !other.is_empty() => {
            let from = within(other.len() - 1);
            data.truncate(at);
            data.extend_from_slice(&other[from..]);
        }
        // A field of a length, a count or an offset.
        9 | 10 => {
            let value =
                EDGES[entropy.below(EDGES.len() as u64) as usize].wrapping_add(entropy.below(3)).wrapping_sub(1);
            let bytes = if entropy.below(2) == 0 { value.to_le_bytes() } else { value.to_be_bytes() };
            let bytes = if entropy.below(2) == 0 { &bytes[..4] } else { &bytes[..] };
            let aligned = at / 4 * 4;
            let end = data.len().min(aligned + bytes.len());
            data[aligned..end].copy_from_slice(&bytes[..end - aligned]);
        }
        _ => data.push(entropy.next_u64() as u8),
    }
}

/// Runs a future that never waits: all its I/O is in memory.
pub fn at_once<F: Future>(future: F) -> F::Output {
    let mut future = std::pin::pin!(future);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    for _ in 0..1_000_000 {
        if let std::task::Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
    }
    panic!("it waits for something")
}
