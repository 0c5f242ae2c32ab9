//! The load behind `scripts/bench namenode`: namespaces of millions of files, in this process and in a real one.
//!
//! ```text
//! load core FILES                 the core alone: bytes per file, creates and stats a second, reports a second
//! load generate DIR FILES EDITS   writes a metadata directory: an image of FILES files and EDITS edits behind it
//! load serve CAIRN DIR FILES      starts `cairn namenode` on it: first answer, end of safe mode, calls over gRPC
//! ```
//! Every file has one block, three replicas on six storages and a name of 20 bytes; 1,000 lie in a directory.

// A measurement needs the machine's own clock and processes.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

mod alone;
mod make;
mod served;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(|word| &**word).collect();
    let number = |word: &str| word.parse::<u64>().expect("a number");
    match words[..] {
        ["core", files] => alone::run(number(files)),
        ["generate", dir, files, edits] => make::generate(dir.as_ref(), number(files), number(edits)),
        ["serve", cairn, dir, files] => served::run(cairn, dir, number(files)),
        _ => {
            eprintln!("usage: load core FILES | generate DIR FILES EDITS | serve CAIRN DIR FILES");
            std::process::exit(2);
        }
    }
}

/// One line of the table.
pub fn row(what: &str, measured: &str) {
    println!("| {what} | {measured} |");
}
