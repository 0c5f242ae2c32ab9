//! Runs the fuzz target that the environment variable `CAIRN_FUZZ` names, and writes its seeds into the folder `CAIRN_FUZZ_CORPUS`; see
//! `scripts/fuzz`.

#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use cairn_tests::fuzz::{Target, meter::Meter, target};

#[global_allocator]
static METER: Meter = Meter;

static TARGET: LazyLock<&'static Target> = LazyLock::new(|| {
    let name = std::env::var("CAIRN_FUZZ").expect("CAIRN_FUZZ must name a target of tests/src/fuzz/mod.rs");
    target(&name)
});

libfuzzer_sys::fuzz_target!(
    init: {
        if let Ok(folder) = std::env::var("CAIRN_FUZZ_CORPUS") {
            for (number, seed) in (TARGET.seeds)().iter().enumerate() {
                std::fs::write(Path::new(&folder).join(format!("seed-{number}")), seed).expect("the corpus takes the seeds");
            }
        }
    },
    |data: &[u8]| TARGET.run_once(data)
);
