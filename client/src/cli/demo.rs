//! `demo`: all of it in half a minute, and nothing left behind.

use std::collections::BTreeMap;

use cairn_client::fs::{ClientSettings, CreateOptions, ErrorCode, FileSystem};
use cairn_common::process;
use comfy_table::{CellAlignment, Table, presets};

use crate::args::DemoArgs;
use crate::cluster::{Cluster, Plan};
use crate::context::Context;
use crate::corpus;
use crate::job;
use crate::local::temporary_folder;
use crate::output::{Failure, Out, Outcome, failure};
use crate::progress::Progress;
use crate::units::{counted, grouped, human_millis, human_size};

/// Small, so that the text has several.
const BLOCK_BYTES: u64 = 8 << 20;
const TEXT: &str = "/demo/text";
const COUNTS: &str = "/demo/counts";
const TOP_WORDS: usize = 10;

/// `demo`
pub async fn demo(context: &mut Context, args: &DemoArgs) -> Outcome {
    let mut stop = std::pin::pin!(process::shutdown_signal());
    let dir = temporary_folder(context, "cairn-demo")?;
    let plan = Plan { dir, datanodes: args.datanodes, racks: args.racks, base_port: Some(0), flags: Vec::new() };
    let mut cluster = Cluster::prepare(&context.env, &plan).await?;
    let outcome = tokio::select! {
        biased;
        () = &mut stop => Err(Failure::Exit(130)),
        outcome = show(context, args, &plan, &mut cluster) => outcome,
    };
    cluster.stop().await;
    outcome
}

async fn show(context: &mut Context, args: &DemoArgs, plan: &Plan, cluster: &mut Cluster) -> Outcome {
    let began_ms = context.env.clock.mono_ms();
    let files = corpus::find(args.size)?;
    let started_ms = context.env.clock.mono_ms();
    cluster.start(plan).await?;
    let elapsed_ms = context.env.clock.mono_ms() - started_ms;
    say(
        context,
        &format!(
            "A cluster of {} in {} is up after {}.",
            counted(args.datanodes.into(), "datanode"),
            counted(args.racks.into(), "rack"),
            human_millis(elapsed_ms)
        ),
    )?;
    let fs = FileSystem::connect(context.env.clone(), ClientSettings::at(cluster.namenode_address())).await?;

    let started_ms = context.env.clock.mono_ms();
    let stored = store(context, &fs, &files, args.size).await?;
    let elapsed_ms = context.env.clock.mono_ms() - started_ms;
    say(
        context,
        &format!(
            "\nStored {} of text from {} on this machine as {TEXT}, durably, in {}.",
            human_size(stored),
            counted(files.len() as u64, "file"),
            human_millis(elapsed_ms)
        ),
    )?;
    show_blocks(&mut context.out, &fs).await?;

    say(context, "\nCounting its words where the blocks are:")?;
    let report = job::wordcount(context, &fs, &[TEXT.to_owned()], COUNTS).await?;
    if context.out.json {
        return context.out.json(&report);
    }
    job::show_tasks(&mut context.out, &report)?;
    job::show_counters(&mut context.out, &report)?;
    show_top_words(&mut context.out, &fs).await?;
    let elapsed_ms = context.env.clock.mono_ms() - began_ms;
    say(context, &format!("\nAll of it took {}. The cluster goes away now.", human_millis(elapsed_ms)))
}

/// Text for people, at once.
fn say(context: &mut Context, text: &str) -> Outcome {
    if context.out.json {
        return Ok(());
    }
    context.out.line(text)?;
    context.out.flush()
}

async fn store(context: &Context, fs: &FileSystem, files: &[std::path::PathBuf], size: u64) -> Outcome<u64> {
    let options = CreateOptions { block_size: BLOCK_BYTES, create_parents: true, ..CreateOptions::default() };
    let mut writer = fs.create(TEXT, options).await?;
    let progress = Progress::start(context, "put", Some(size));
    let mut stored = 0;
    for path in files {
        if stored >= size {
            break;
        }
        let path = path.clone();
        let Some(mut bytes) = context.env.work.io(move || corpus::read(&path)).await else { continue };
        bytes.truncate(usize::try_from(size - stored).unwrap_or(usize::MAX));
        stored += bytes.len() as u64;
        progress.add(bytes.len() as u64);
        writer.write_bytes(bytes.into()).await?;
    }
    writer.close().await?;
    progress.finish().await;
    if stored == 0 {
        return Err(failure(ErrorCode::FileNotFound, "none of the files found is text"));
    }
    Ok(stored)
}

/// Blocks and bytes by node.
async fn show_blocks(out: &mut Out, fs: &FileSystem) -> Outcome {
    let blocks = fs.block_locations(TEXT, 0, 0).await?;
    let mut by_node: BTreeMap<(String, String), (u64, u64)> = BTreeMap::new();
    for block in &blocks {
        for replica in &block.replicas {
            let held = by_node.entry((replica.host.clone(), replica.rack.clone())).or_default();
            held.0 += 1;
            held.1 += block.length;
        }
    }
    if out.json {
        return Ok(());
    }
    let replicas: u64 = by_node.values().map(|(count, _)| count).sum();
    out.line(format!("{} with {} in all:", counted(blocks.len() as u64, "block"), counted(replicas, "replica")))?;
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY).set_header(["node", "rack", "blocks", "text"]);
    for ((host, rack), (count, bytes)) in by_node {
        table.add_row([host, rack, count.to_string(), human_size(bytes)]);
    }
    align_right(&mut table, &[2, 3]);
    out.line(table.to_string())?;
    out.flush()
}

/// Numbers to the right.
pub fn align_right(table: &mut Table, columns: &[usize]) {
    for at in columns {
        if let Some(column) = table.column_mut(*at) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

async fn show_top_words(out: &mut Out, fs: &FileSystem) -> Outcome {
    let mut top = Top::default();
    for part in fs.glob(&format!("{COUNTS}/part-r-*")).await? {
        let mut reader = fs.open(&part.path).await?;
        while let Some(piece) = reader.next_chunk().await? {
            top.take(&piece);
        }
        top.end();
    }
    out.line(format!("\nThe {} most frequent of {}:", top.words.len(), counted(top.distinct, "word")))?;
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY).set_header(["word", "count"]);
    for (count, word) in &top.words {
        table.add_row([String::from_utf8_lossy(word).into_owned(), grouped(*count)]);
    }
    align_right(&mut table, &[1]);
    out.line(table.to_string())
}

/// The most frequent words of `word<TAB>count` lines that come in pieces.
#[derive(Default)]
struct Top {
    /// The most frequent first.
    words: Vec<(u64, Vec<u8>)>,
    distinct: u64,
    /// The beginning of a line whose end has not come yet.
    rest: Vec<u8>,
}

impl Top {
    fn take(&mut self, piece: &[u8]) {
        let mut lines = piece.split(|byte| *byte == b'\n');
        let last = lines.next_back().unwrap_or_default();
        for line in lines {
            if self.rest.is_empty() {
                self.line(line);
            } else {
                let mut whole = std::mem::take(&mut self.rest);
                whole.extend_from_slice(line);
                self.line(&whole);
            }
        }
        self.rest.extend_from_slice(last);
    }

    fn end(&mut self) {
        let rest = std::mem::take(&mut self.rest);
        self.line(&rest);
    }

    fn line(&mut self, line: &[u8]) {
        let Some(tab) = line.iter().rposition(|byte| *byte == b'\t') else { return };
        let Some(count) = std::str::from_utf8(&line[tab + 1..]).ok().and_then(|text| text.parse::<u64>().ok()) else {
            return;
        };
        self.distinct += 1;
        let at = self.words.partition_point(|(other, _)| *other >= count);
        if at < TOP_WORDS {
            self.words.insert(at, (count, line[..tab].to_vec()));
            self.words.truncate(TOP_WORDS);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_top_is_right_wherever_the_pieces_are_cut() {
        let lines: String = (1..=50).map(|number| format!("w{number}\t{}\n", (number * 37) % 101)).collect();
        let mut whole = Top::default();
        whole.take(lines.as_bytes());
        whole.end();
        assert_eq!((whole.distinct, whole.words.len()), (50, TOP_WORDS));
        assert!(whole.words.windows(2).all(|pair| pair[0].0 >= pair[1].0));
        for cut in 1..40 {
            let mut top = Top::default();
            lines.as_bytes().chunks(cut).for_each(|piece| top.take(piece));
            top.end();
            assert_eq!((top.words, top.distinct), (whole.words.clone(), 50));
        }
    }
}
