//! The namenode's core: edits that a log could hold, requests that a client or datanode could send, pages of an image.

mod edits;
mod events;

use cairn_namenode::core::{Core, CoreSettings, Now};
use cairn_proto::ids::TxId;

pub use edits::replay;
pub use events::core_events;

use self::events::Cluster;
use super::input::Input;

const START: Now = Now { mono_ms: 1_000_000, wall_ms: 1_700_000_000_000 };
const USERS: [&str; 4] = ["root", "ann", "bob", ""];
const NODES: [&str; 5] = ["n0", "n1", "n2", "n3", ""];

fn settings() -> CoreSettings {
    CoreSettings { min_block_size: 512, default_block_size: 1 << 20, cursor_budget: 7, ..CoreSettings::default() }
}

fn pick(input: &mut Input<'_>, choices: &[&str]) -> String {
    (*input.pick(choices)).to_owned()
}

/// The pages of the state, loaded again, are the state.
fn check_image(core: &mut Core) {
    let txid = core.checkpoint_begin();
    let digest = core.digest();
    let mut pages = Vec::new();
    while !core.checkpoint_slice(1, &mut pages) {}
    let mut other = Core::new_for_load(settings());
    for page in pages.iter().rev() {
        other.load_page(page).unwrap();
    }
    other.finish_load(txid).unwrap();
    assert_eq!((other.digest(), other.last_txid()), (digest, txid));
}

/// Noise that reads as steps.
pub fn recipe_seeds() -> Vec<Vec<u8>> {
    let entropy = cairn_common::entropy::Entropy::seeded(3);
    [40usize, 300, 900, 2_000]
        .map(|length| {
            let mut bytes = vec![0; length];
            entropy.fill(&mut bytes);
            bytes
        })
        .to_vec()
}

fn pages() -> (TxId, Vec<Vec<u8>>) {
    let mut cluster = Cluster::new();
    for seed in recipe_seeds() {
        let mut input = Input::new(&seed);
        while !input.is_empty() {
            cluster.step(&mut input);
        }
    }
    let txid = cluster.core.checkpoint_begin();
    let mut pages = Vec::new();
    while !cluster.core.checkpoint_slice(1, &mut pages) {}
    (txid, pages)
}

/// Pages of an image, each with two bytes of length before it: loaded or refused, never a panic, and never another state than was promised.
pub fn image_pages(data: &[u8]) {
    let mut input = Input::new(data);
    let txid = TxId(u64::from(input.byte()));
    let mut core = Core::new_for_load(settings());
    while !input.is_empty() {
        let length = usize::from(input.short());
        if core.load_page(input.take(length)).is_err() {
            return;
        }
    }
    if core.finish_load(txid).is_ok() {
        assert_eq!(core.last_txid(), txid);
        check_image(&mut core);
    }
}

/// See [`image_pages`].
pub fn page_seeds() -> Vec<Vec<u8>> {
    let (txid, pages) = pages();
    let tagged = |page: &Vec<u8>| [&(page.len() as u16).to_le_bytes()[..], page].concat();
    let whole: Vec<u8> = pages.iter().flat_map(tagged).collect();
    let mut seeds = vec![[&[txid.0 as u8][..], &whole].concat()];
    seeds.extend(pages.iter().map(|page| [&[1][..], &tagged(page)].concat()));
    // A number that takes the slot beyond what numbers can hold.
    seeds.push([&[1, 16, 0, 1, 0, 2, 1][..], &[0xff; 9], &[1]].concat());
    seeds
}
