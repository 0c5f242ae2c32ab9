//! What may happen to a namenode: the alphabet of the property tests.

use proptest::prelude::*;

/// Modes that matter to somebody.
const MODES: [u32; 8] = [0o755, 0o777, 0o700, 0o1777, 0o000, 0o500, 0o711, 0o070];

/// One thing that happens. Numbers that pick something are taken modulo how many there are.
#[derive(Clone, Debug)]
pub enum Operation {
    // Names.
    Mkdirs {
        user: u8,
        path: String,
        mode: u32,
    },
    Rename {
        user: u8,
        from: String,
        to: String,
        overwrite: bool,
    },
    Delete {
        user: u8,
        path: String,
        recursive: bool,
    },
    Chmod {
        user: u8,
        path: String,
        mode: u32,
    },
    Chown {
        path: String,
        owner: u8,
    },
    SetTimes {
        path: String,
        modified_ms: u64,
    },
    Setrep {
        user: u8,
        path: String,
        replication: u32,
    },
    // Writers. `file` picks among the files that were opened so far.
    Create {
        user: u8,
        path: String,
        overwrite: bool,
        writer: u8,
    },
    AddBlock {
        file: u8,
        copies: u8,
        length: u16,
    },
    Abandon {
        file: u8,
    },
    NewPipeline {
        file: u8,
        keep: u8,
    },
    Complete {
        file: u8,
        late: bool,
    },
    /// Create, one block on every node of its pipeline, complete.
    Write {
        user: u8,
        path: String,
        writer: u8,
    },
    Renew {
        writer: u8,
    },
    Append {
        user: u8,
        path: String,
        writer: u8,
    },
    /// Cut behind so many blocks. (A cut inside a block is a recovery under another name; `truncate.rs` has its tests.)
    Truncate {
        user: u8,
        path: String,
        blocks: u8,
    },
    Concat {
        user: u8,
        target: String,
        source: String,
    },
    // Further operations: their step in `driver.rs` or `writers.rs`, their meaning in `Model`, their share in `plain`.
    // Datanodes and their replicas.
    NodeDown {
        node: u8,
    },
    NodeUp {
        node: u8,
    },
    Wipe {
        node: u8,
    },
    Lose {
        block: u8,
        node: u8,
    },
    Corrupt {
        block: u8,
        node: u8,
    },
    // Time, durability, the namenode itself.
    Sync,
    Tick,
    Pass {
        ms: u64,
    },
    SafeMode {
        on: bool,
    },
    BeginImage,
    Slice {
        pages: u8,
    },
    /// The namenode ends and starts again. Of the edits that are not synced the last `lose` operations' are lost.
    Restart {
        lose: u8,
        image: bool,
    },
    /// A client sends a call again whose answer it did not get.
    Again {
        call: u8,
    },
}

/// A path of up to three components out of few names, so that operations meet.
pub fn path() -> impl Strategy<Value = String> {
    proptest::collection::vec(0u8..3, 1..4)
        .prop_map(|parts| parts.iter().map(|part| format!("/{}", (b'a' + part) as char)).collect())
}

fn mode() -> impl Strategy<Value = u32> {
    proptest::sample::select(&MODES[..])
}

/// Changes of names and files, for a namenode and datanodes that stay up.
pub fn plain() -> impl Strategy<Value = Operation> {
    use Operation as O;
    prop_oneof![
        3 => (0u8..3, path(), mode()).prop_map(|(user, path, mode)| O::Mkdirs { user, path, mode }),
        4 => (0u8..3, path(), path(), any::<bool>())
            .prop_map(|(user, from, to, overwrite)| O::Rename { user, from, to, overwrite }),
        3 => (0u8..3, path(), any::<bool>()).prop_map(|(user, path, recursive)| O::Delete { user, path, recursive }),
        2 => (0u8..3, path(), mode()).prop_map(|(user, path, mode)| O::Chmod { user, path, mode }),
        1 => (path(), 0u8..3).prop_map(|(path, owner)| O::Chown { path, owner }),
        1 => (path(), 0u64..3_000_000_000_000).prop_map(|(path, modified_ms)| O::SetTimes { path, modified_ms }),
        2 => (0u8..3, path(), 1u32..5).prop_map(|(user, path, replication)| O::Setrep { user, path, replication }),
        3 => (0u8..3, path(), any::<bool>(), 0u8..3)
            .prop_map(|(user, path, overwrite, writer)| O::Create { user, path, overwrite, writer }),
        4 => (0u8..8, 0u8..4, 0u16..2_000)
            .prop_map(|(file, copies, length)| O::AddBlock { file, copies, length }),
        1 => (0u8..8).prop_map(|file| O::Abandon { file }),
        1 => (0u8..8, any::<u8>()).prop_map(|(file, keep)| O::NewPipeline { file, keep }),
        3 => (0u8..8, any::<bool>()).prop_map(|(file, late)| O::Complete { file, late }),
        4 => (0u8..3, path(), 0u8..3).prop_map(|(user, path, writer)| O::Write { user, path, writer }),
        1 => (0u8..3).prop_map(|writer| O::Renew { writer }),
        2 => (0u8..3, path(), 0u8..3).prop_map(|(user, path, writer)| O::Append { user, path, writer }),
        1 => (0u8..3, path(), 0u8..3).prop_map(|(user, path, blocks)| O::Truncate { user, path, blocks }),
        2 => (0u8..3, path(), 0u8..3, any::<bool>()).prop_map(|(user, target, name, sibling)| {
            // Mostly a file of the same directory.
            let directory = if sibling { super::parent(&target) } else { "/" };
            let source = format!("{}/{}", directory.trim_end_matches('/'), (b'a' + name) as char);
            O::Concat { user, target, source }
        }),
        2 => Just(O::Sync),
        1 => Just(O::Tick),
    ]
}

/// Everything.
pub fn any_operation() -> impl Strategy<Value = Operation> {
    use Operation as O;
    prop_oneof![
        60 => plain(),
        2 => any::<u8>().prop_map(|node| O::NodeDown { node }),
        3 => any::<u8>().prop_map(|node| O::NodeUp { node }),
        1 => any::<u8>().prop_map(|node| O::Wipe { node }),
        2 => any::<(u8, u8)>().prop_map(|(block, node)| O::Lose { block, node }),
        2 => any::<(u8, u8)>().prop_map(|(block, node)| O::Corrupt { block, node }),
        4 => (1u64..4_000).prop_map(|ms| O::Pass { ms }),
        1 => (4_000u64..14_000).prop_map(|ms| O::Pass { ms }),
        1 => any::<bool>().prop_map(|on| O::SafeMode { on }),
        2 => Just(O::SafeMode { on: false }),
        2 => Just(O::BeginImage),
        6 => (1u8..4).prop_map(|pages| O::Slice { pages }),
        3 => (0u8..6, any::<bool>()).prop_map(|(lose, image)| O::Restart { lose, image }),
        4 => any::<u8>().prop_map(|call| O::Again { call }),
    ]
}
