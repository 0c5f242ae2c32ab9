//! Bytes that a close or an hsync acknowledged are there and equal; no reader ever gets others.

use std::collections::BTreeMap;

use crate::inspect::Found;
use crate::oracle::{Known, Model};
use crate::trace::violated;

/// Bytes that must be there, of each file that must be there.
pub fn promised(model: &Model) -> Vec<u64> {
    let sure = model.files.values().filter_map(|known| match known {
        Known::Sure(file) => Some(file.least),
        Known::Unsure(_) => None,
    });
    sure.collect()
}

/// Compares all files that a fresh client read after the heal with what the client `who` knows.
pub fn check(model: &Model, found: &BTreeMap<String, Found>, who: &str) {
    for (path, known) in &model.files {
        let verdict = match found.get(path) {
            Some(Found { bytes: Err(error), .. }) => Err(format!("it cannot be read: {error}")),
            Some(Found { bytes: Ok(bytes), .. }) => known.allows(Some(bytes)),
            None => known.allows(None),
        };
        if let Err(why) = verdict {
            violated("acked_bytes", format!("{who}: {path} after the heal: {why}"));
        }
    }
    for (from, to, file) in &model.moves {
        let whole = |path: &str| {
            found.get(path).is_some_and(|found| found.bytes.as_ref().is_ok_and(|b| file.allows(b).is_ok()))
        };
        // Either may have been replaced or removed since by a call that nobody knows the end of.
        let touched = |path: &str| model.moves.iter().filter(|(a, b, _)| a == path || b == path).count() > 1;
        if !whole(from) && !whole(to) && !touched(from) && !touched(to) {
            violated("acked_bytes", format!("{who}: neither {from} nor {to} holds what was renamed"));
        }
    }
}
