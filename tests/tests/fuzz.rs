//! A short, seeded run of every fuzz target; `scripts/fuzz` runs them for as long as wanted.

use cairn_tests::fuzz::{TARGETS, meter::Meter, target};

#[global_allocator]
static METER: Meter = Meter;

macro_rules! seeded_runs {
    ($($name:ident)*) => {
        const TESTED: &[&str] = &[$(stringify!($name)),*];
        $(
            #[test]
            fn $name() {
                let target = target(stringify!($name));
                target.run_seeded(1, target.rounds);
            }
        )*
    };
}

seeded_runs! {
    frame_header frame_payload frame_stream block_file block_name map_output messages errors log_segment log_damage log_crash image_file image_pages
    replay core_events volume_scan version_files settings_files paths globs units
}

#[test]
fn every_target_is_run() {
    assert_eq!(TARGETS.iter().map(|target| target.name).collect::<Vec<_>>(), TESTED);
}
