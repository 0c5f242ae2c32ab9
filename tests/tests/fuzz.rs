//! A short, seeded run of every fuzz target; `scripts/fuzz` runs them for as long as wanted. Where cargo-fuzz is not at hand:
//! `CAIRN_FUZZ_SEEDS=1000 cargo nextest run -p cairn-tests --test fuzz` runs each with as many seeds instead of one.

use cairn_tests::fuzz::{TARGETS, meter::Meter, target};

#[global_allocator]
static METER: Meter = Meter;

fn run(name: &str) {
    let target = target(name);
    let seeds = std::env::var("CAIRN_FUZZ_SEEDS")
        .map_or(1, |seeds| seeds.parse().unwrap_or_else(|_| panic!("CAIRN_FUZZ_SEEDS = {seeds} is no number")));
    for seed in 1..=seeds {
        target.run_seeded(seed, target.rounds);
    }
}

macro_rules! seeded_runs {
    ($($name:ident)*) => {
        const TESTED: &[&str] = &[$(stringify!($name)),*];
        $(
            #[test]
            fn $name() {
                run(stringify!($name));
            }
        )*
    };
}

seeded_runs! {
    frame_header frame_payload frame_stream block_file block_name map_output container encoding position_note kept_content messages errors log_segment log_damage log_crash image_file image_pages
    replay core_events volume_scan version_files settings_files hadoop_rpc hadoop_packets hadoop_operations paths globs web_addresses units
}

#[test]
fn every_target_is_run() {
    assert_eq!(TARGETS.iter().map(|target| target.name).collect::<Vec<_>>(), TESTED);
}
