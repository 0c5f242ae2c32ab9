//! Which line a mapper's command failed on: it is tried on ever fewer of the lines that it was given last.
//!
//! A command reads ahead and says nothing of lines, so that its death alone tells no more than where its input was. It is run again on the last mebibyte of
//! that; if it fails there as well, halving finds the first line with which it does. The attempt has failed already: nothing that these runs
//! print, count or say is kept. They end after [`LIMIT_MS`] at the latest, and find nothing if the command does not fail again, or fails
//! without any input.

use super::Stage;
use super::child::Deadline;
use crate::mapreduce::{Batch, Error, ErrorCode, Record, Result, TaskContext};

/// Input that is looked through: more than the command, its pipe and we ourselves hold of it.
pub(super) const RECENT_BYTES: usize = 1 << 20;
/// For all runs together.
const LIMIT_MS: u64 = 20_000;
/// Bytes of the line that are shown.
const SHOWN_BYTES: usize = 80;

/// The error with the line that is to blame, or with how far the command may have been.
pub(super) fn name(error: Error, stage: &Stage, task: &TaskContext, recent: &[Batch]) -> Error {
    let Some(last) = recent.last() else { return error };
    let end = last.offset + last.bytes.len() as u64;
    let place = match first_bad(stage, task, recent) {
        // It fails whatever it is given: no line is to blame.
        Ok(Found::Always) => return error,
        Ok(Found::Line(record)) => {
            let start = String::from_utf8_lossy(&record.bytes[..record.bytes.len().min(SHOWN_BYTES)]).into_owned();
            format!("it happened on the record at byte {} of {}, which starts with {start:?}", record.offset, last.path)
        }
        Ok(Found::Nothing) | Err(_) => format!("it had been given {} up to byte {end}", last.path),
    };
    Error::new(error.code(), format!("{}; {place}", error.message())).with_subject(error.subject())
}

enum Found<'a> {
    Always,
    Line(Record<'a>),
    Nothing,
}

fn first_bad<'a>(stage: &Stage, task: &TaskContext, recent: &'a [Batch]) -> Result<Found<'a>> {
    let deadline = Deadline::after(LIMIT_MS);
    let lines = || recent.iter().flat_map(Batch::records);
    let fails = |count: usize| fails_on(stage, task, lines().take(count), deadline.clone());
    if fails(0)? {
        return Ok(Found::Always);
    }
    let (mut good, mut bad) = (0, lines().count());
    if bad == 0 || !fails(bad)? {
        return Ok(Found::Nothing);
    }
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        if fails(middle)? {
            bad = middle;
        } else {
            good = middle;
        }
    }
    Ok(lines().nth(good).map_or(Found::Nothing, Found::Line))
}

/// Does the command crash when these lines are all of its input? An error: it cannot be told.
fn fails_on<'a>(
    stage: &Stage,
    task: &TaskContext,
    lines: impl Iterator<Item = Record<'a>>,
    deadline: Deadline,
) -> Result<bool> {
    let apart = TaskContext { user_counters: task.user_counters.apart(), ..task.clone() };
    let mut child = stage.try_out(&apart)?.until(deadline);
    let fed = || {
        for line in lines {
            child.input().extend_from_slice(line.bytes);
            child.input().push(b'\n');
            child.feed(&mut |_| Ok(()))?;
        }
        child.finish(&mut |_| Ok(()))
    };
    match fed() {
        Err(error) if error.code() == ErrorCode::TimedOut => Err(error),
        _ => Ok(child.crashed()),
    }
}
