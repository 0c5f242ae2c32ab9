//! Images: the whole state at one transaction, so that a start need not replay everything since the beginning.
//!
//! # Overview
//! * [`mod@format`]: the bytes
//! * [`ImageWriter`]: writes pages into all metadata directories
//! * [`read_image`]: reads one and checks every byte
//! * [`Imager`]: the thread that compresses and writes, fed by the owner of the core through a bounded channel
//!
//! # Consistency
//! The pages come from the core as they were at transaction S, whatever changed since (it copies a page before its first
//! change). The owner gives the last one only when S is durable, so an image never knows more than the log.
//!
//! # Crash
//! An image has its name only when it is whole. The two newest are kept, with all log that the older one needs: if the
//! newest does not verify at the next start, the older one and a longer replay lead to the same state.

pub mod format;
mod read;
mod thread;
mod write;

#[cfg(test)]
mod tests;

pub use read::{ImageFacts, ImageFile, list_images, read_image, read_image_on, read_open_image, remove_leftovers};
pub use thread::{ImageJob, Imager, PageRoom};
pub use write::{ImageWriter, Written};
