//! What the namenode serves is what its durable log says: after a power cut it comes back with the same names, lengths and blocks. (The start
//! itself refuses a log with a gap, or an edit that does not fit.)

use std::collections::BTreeMap;

use crate::inspect::Found;
use crate::trace::violated;

/// Compares what was found before and after.
pub fn check(before: &BTreeMap<String, Found>, after: &BTreeMap<String, Found>) {
    for (path, found) in before {
        match after.get(path) {
            None => violated("log_is_truth", format!("{path} is gone after a restart of the namenode")),
            Some(again) if again.facts() != found.facts() => {
                violated("log_is_truth", format!("{path}: {:?} became {:?}", found.facts(), again.facts()));
            }
            Some(_) => {}
        }
    }
    for path in after.keys().filter(|path| !before.contains_key(*path)) {
        violated("log_is_truth", format!("{path} appeared with a restart of the namenode"));
    }
}
