//! Fuzz targets: every decoder of bytes that come from a disk, a peer or a person.
//!
//! A [`Target`] is a plain function over bytes that panics if a promise is broken. Two things drive it: `tests/fuzz` (cargo-fuzz,
//! for hours; see `scripts/fuzz`), and [`Target::run_seeded`] in the ordinary tests (some thousand seeded mutations of valid inputs).
//!
//! Most formats end in a checksum, which no mutation gets right. So targets look at the bytes as they are (damage must be noticed) and again with
//! the checksums made right (whoever can compute a checksum still must not get past the checks behind it), or take the bytes as a recipe.
//!
//! What a target may allocate is part of the promise ([`Target::memory`]); [`meter::Meter`] measures it.

pub mod core;
pub mod formats;
pub mod hadoop;
pub mod input;
pub mod log;
pub mod meter;
pub mod node;
pub mod records;
pub mod text;

use cairn_common::entropy::Entropy;

/// A function to feed with bytes.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, on the command line too.
    pub name: &'static str,
    /// Panics if a promise is broken.
    pub run: fn(&[u8]),
    /// Valid inputs, where mutations start.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Most bytes that it may hold at a time, beside 256 times its input (small messages become large structs).
    pub memory: usize,
    /// Mutations in the ordinary tests: as many as take about a second.
    pub rounds: u32,
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target {
        name: "frame_header",
        run: formats::frame_header,
        seeds: formats::header_seeds,
        memory: MIB,
        rounds: 5_000,
    },
    Target {
        name: "frame_payload",
        run: formats::frame_payload,
        seeds: formats::payload_seeds,
        memory: 16 * MIB,
        rounds: 1_000,
    },
    Target {
        name: "frame_stream",
        run: formats::frame_stream,
        seeds: formats::stream_seeds,
        memory: 16 * MIB,
        rounds: 1_000,
    },
    Target {
        name: "block_file",
        run: formats::block_file,
        seeds: formats::block_file_seeds,
        memory: 4 * MIB,
        rounds: 3_000,
    },
    Target { name: "block_name", run: formats::block_name, seeds: formats::name_seeds, memory: MIB, rounds: 5_000 },
    Target {
        name: "map_output",
        run: formats::map_output,
        seeds: formats::map_output_seeds,
        memory: 64 * MIB,
        rounds: 100,
    },
    Target {
        name: "container",
        run: records::container,
        seeds: records::container_seeds,
        memory: 64 * MIB,
        rounds: 1_000,
    },
    Target {
        name: "encoding",
        run: records::encoding,
        seeds: records::encoding_seeds,
        memory: 4 * MIB,
        rounds: 20_000,
    },
    Target {
        name: "position_note",
        run: records::position_note,
        seeds: records::position_seeds,
        memory: MIB,
        rounds: 5_000,
    },
    Target {
        name: "kept_content",
        run: records::kept_content,
        seeds: records::kept_seeds,
        memory: 2 * MIB,
        rounds: 5_000,
    },
    Target { name: "messages", run: formats::messages, seeds: formats::message_seeds, memory: 4 * MIB, rounds: 5_000 },
    Target { name: "errors", run: formats::errors, seeds: formats::error_seeds, memory: MIB, rounds: 2_000 },
    Target { name: "log_segment", run: log::log_segment, seeds: log::segment_seeds, memory: 4 * MIB, rounds: 1_500 },
    Target { name: "log_damage", run: log::log_damage, seeds: log::recipe_seeds, memory: 16 * MIB, rounds: 800 },
    Target { name: "log_crash", run: log::log_crash, seeds: log::recipe_seeds, memory: 16 * MIB, rounds: 800 },
    Target { name: "image_file", run: log::image_file, seeds: log::image_seeds, memory: 600 * MIB, rounds: 800 },
    Target { name: "image_pages", run: core::image_pages, seeds: core::page_seeds, memory: 4 * MIB, rounds: 2_000 },
    Target { name: "replay", run: core::replay, seeds: core::recipe_seeds, memory: 16 * MIB, rounds: 400 },
    Target { name: "core_events", run: core::core_events, seeds: core::recipe_seeds, memory: 32 * MIB, rounds: 400 },
    Target { name: "volume_scan", run: node::volume_scan, seeds: node::recipe_seeds, memory: 32 * MIB, rounds: 150 },
    Target {
        name: "version_files",
        run: node::version_files,
        seeds: node::version_seeds,
        memory: 4 * MIB,
        rounds: 2_000,
    },
    Target {
        name: "settings_files",
        run: node::settings_files,
        seeds: node::settings_seeds,
        memory: 4 * MIB,
        rounds: 1_000,
    },
    Target { name: "hadoop_rpc", run: hadoop::hadoop_rpc, seeds: hadoop::rpc_seeds, memory: MIB, rounds: 5_000 },
    Target {
        name: "hadoop_packets",
        run: hadoop::hadoop_packets,
        seeds: hadoop::packet_seeds,
        memory: 16 * MIB,
        rounds: 1_000,
    },
    Target {
        name: "hadoop_operations",
        run: hadoop::hadoop_operations,
        seeds: hadoop::operation_seeds,
        memory: 4 * MIB,
        rounds: 3_000,
    },
    Target { name: "paths", run: text::paths, seeds: text::path_seeds, memory: 4 * MIB, rounds: 1_000 },
    Target { name: "globs", run: text::globs, seeds: text::glob_seeds, memory: 64 * MIB, rounds: 400 },
    Target { name: "web_addresses", run: text::web_addresses, seeds: text::web_seeds, memory: 4 * MIB, rounds: 2_000 },
    Target { name: "units", run: text::units, seeds: text::unit_seeds, memory: MIB, rounds: 5_000 },
];

const MIB: usize = 1 << 20;

/// The target of this name.
pub fn target(name: &str) -> &'static Target {
    TARGETS.iter().find(|target| target.name == name).unwrap_or_else(|| panic!("no fuzz target {name:?}"))
}

/// Shows the input if the target panics with it.
struct Culprit<'a> {
    target: &'static str,
    data: &'a [u8],
}

impl Drop for Culprit<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let hex: String = self.data.iter().map(|byte| format!("{byte:02x}")).collect();
            eprintln!("fuzz target {} failed on {} bytes (hex): {hex}", self.target, self.data.len());
        }
    }
}

impl Target {
    /// Runs it once; checks what it allocates if the program counts that.
    pub fn run_once(&self, data: &[u8]) {
        let culprit = Culprit { target: self.name, data };
        let meter = meter::start();
        (self.run)(data);
        let (peak, limit) = (meter.peak(), self.memory + 256 * data.len());
        assert!(peak <= limit, "{} held {peak} bytes for an input of {}, more than {limit}", self.name, data.len());
        drop(culprit);
    }

    /// The valid inputs as they are, then `rounds` mutations of them.
    pub fn run_seeded(&self, seed: u64, rounds: u32) {
        let entropy = Entropy::seeded(seed);
        let seeds = (self.seeds)();
        seeds.iter().for_each(|data| self.run_once(data));
        for _ in 0..rounds {
            self.run_once(&input::mutated(&seeds, &entropy));
        }
    }
}
