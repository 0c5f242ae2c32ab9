//! What was made, renamed or removed by an acknowledged call is so: in every listing, and in the answer to every later call.

use crate::oracle::{Known, Model};
use crate::trace::violated;

/// Compares the entries of `root` (path and length) with what its client knows.
pub fn check_listing(model: &Model, root: &str, found: &[(String, u64)], who: &str) {
    let inside = |path: &str| path.rsplit_once('/').is_some_and(|(parent, _)| parent == root);
    for (path, known) in model.files.iter().filter(|(path, _)| inside(path)) {
        let length = found.iter().find(|(name, _)| name == path).map(|(_, length)| *length);
        if let (Known::Sure(file), found) = (known, length) {
            match found {
                None => violated("acked_names", format!("{who}: {path} is not listed")),
                Some(length) if file.closed && length != file.bytes.len() => {
                    let text = format!("{who}: {path} is listed with {length} bytes, closed with {}", file.bytes.len());
                    violated("acked_names", text);
                }
                Some(_) => {}
            }
        }
    }
    for dir in model.dirs.iter().filter(|dir| inside(dir)) {
        if !found.iter().any(|(name, _)| name == dir) {
            violated("acked_names", format!("{who}: {dir} is not listed"));
        }
    }
    for (path, _) in found {
        let known = model.files.contains_key(path) || model.dirs.contains(path) || model.unsure_dirs.contains(path);
        if !known {
            violated("acked_names", format!("{who}: {path} is listed and must not be there"));
        }
    }
}
