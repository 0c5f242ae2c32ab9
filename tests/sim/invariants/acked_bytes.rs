//! Bytes that a close or an hsync acknowledged are there and equal; no reader ever gets others.

use std::collections::BTreeMap;

use crate::inspect::Found;
use crate::oracle::Model;
use crate::trace::violated;

/// Compares all files that a fresh client read after the heal with what the client `who` knows.
pub fn check(model: &Model, found: &BTreeMap<String, Found>, who: &str) {
    for (path, known) in &model.files {
        let verdict = match found.get(path) {
            Some(Found { bytes: Err(error), .. }) => Err(error.clone()),
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
