//! A namespace made of edits, and a metadata directory that holds it.

use std::path::Path;
use std::sync::Arc;

use cairn_common::Env;
use cairn_namenode::core::{Core, CoreSettings};
use cairn_namenode::image::ImageWriter;
use cairn_namenode::image::format::ImageHeader;
use cairn_namenode::journal::{LogSizes, LogWriter, list_segments, open_set, read_log};
use cairn_namenode::{Namenode, NamenodeSettings};
use cairn_proto::ids::{BlockId, Generation, InodeId, TxId};
use cairn_proto::pb::{self, edit::Kind};
use prost::Message as _;

/// Datanodes with one storage each.
pub const NODES: u64 = 6;
/// Files in a directory.
pub const PER_DIRECTORY: u64 = 1_000;
/// Length of every block, bytes.
pub const LENGTH: u64 = 1_000;

/// Path of a file.
pub fn path(file: u64) -> String {
    format!("/data/directory-{:010}/file-{file:015}", file / PER_DIRECTORY)
}

/// Block and generation of a file.
pub fn block_of(file: u64) -> (u64, u64) {
    (BlockId::BASE.0 as u64 + 1 + file, Generation::FIRST.0 + file)
}

/// The nodes that hold a file.
pub fn nodes_of(file: u64) -> [u64; 3] {
    [file % NODES, (file + 1) % NODES, (file + 3) % NODES]
}

/// What the log says of a node; a registration that says the same leaves no edit.
pub fn node(index: u64) -> pb::EditRegisterNode {
    pb::EditRegisterNode {
        node_id: format!("node-{index}"),
        host: format!("host-{index}"),
        address: format!("127.0.0.1:{}", 40_000 + index),
        http_address: String::new(),
        rack: format!("/rack-{}", index / 2),
        storages: vec![pb::EditStorage { storage_id: format!("storage-{index}"), storage_type: 0 }],
    }
}

/// Gives the edits of a namespace, one after the other.
pub struct Maker {
    /// The last transaction.
    pub last: TxId,
    inode: u64,
    data: u64,
    directory: u64,
    file: u64,
}

impl Maker {
    /// Goes on behind the edits of a formatted, empty cluster.
    pub fn after(last: TxId) -> Self {
        Self { last, inode: InodeId::ROOT.0, data: 0, directory: 0, file: 0 }
    }

    fn edit(&mut self, kind: Kind, take: &mut impl FnMut(TxId, pb::Edit)) {
        self.last = self.last.next();
        take(self.last, pb::Edit { min_reader: 1, time_ms: 1_700_000_000_000, kind: Some(kind), ..Default::default() });
    }

    fn directory(&mut self, parent: u64, name: String, take: &mut impl FnMut(TxId, pb::Edit)) -> u64 {
        self.inode += 1;
        let inode = self.inode;
        let (owner, group, permission) = ("ann".into(), "users".into(), 0o755);
        self.edit(Kind::Mkdir(pb::EditMkdir { inode, parent, name: name.into(), owner, group, permission }), take);
        inode
    }

    /// The nodes and the directory of everything.
    pub fn begin(&mut self, mut take: impl FnMut(TxId, pb::Edit)) {
        for index in 0..NODES {
            self.edit(Kind::RegisterNode(node(index)), &mut take);
        }
        self.data = self.directory(InodeId::ROOT.0, "data".into(), &mut take);
    }

    /// The next file: created, one block, closed.
    pub fn next_file(&mut self, mut take: impl FnMut(TxId, pb::Edit)) {
        if self.file.is_multiple_of(PER_DIRECTORY) {
            let name = format!("directory-{:010}", self.file / PER_DIRECTORY);
            self.directory = self.directory(self.data, name, &mut take);
        }
        self.inode += 1;
        let (inode, (id, generation)) = (self.inode, block_of(self.file));
        let create = pb::EditCreate {
            inode,
            parent: self.directory,
            name: format!("file-{:015}", self.file).into(),
            owner: "ann".into(),
            group: "users".into(),
            permission: 0o644,
            replication: 3,
            block_size: 128 << 20,
            client_name: "load".into(),
            replaces: 0,
        };
        self.edit(Kind::Create(create), &mut take);
        let block_id = id as i64;
        self.edit(Kind::AddBlock(pb::EditAddBlock { inode, block_id, generation, index: 0 }), &mut take);
        let blocks = vec![pb::EditBlockLength { block_id, generation, length: LENGTH }];
        self.edit(Kind::Close(pb::EditClose { inode, blocks }), &mut take);
        self.file += 1;
    }
}

/// Writes a metadata directory with an image of `files` files, and at least `edits` edits behind it.
pub fn generate(dir: &Path, files: u64, edits: u64) {
    let env = Env::system();
    let settings =
        NamenodeSettings { dirs: vec![dir.to_owned()], listen: "127.0.0.1:0".into(), ..NamenodeSettings::default() };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let running = Namenode::start(env.clone(), settings).await.expect("a new directory");
        running.shutdown().await.unwrap();
    });
    let set = open_set(&*env.fs, &[dir.to_owned()], false, &mut || env.entropy.uuid()).unwrap();
    let facts = set.facts.clone().unwrap();
    let meta = Arc::clone(&set.found[0].dir);
    let mut core = Core::new_for_load(CoreSettings::default());
    read_log(&*env.fs, &meta.log(), &facts.cluster_id, TxId(1), |record, payload| {
        core.replay(record.txid, pb::Edit::decode(payload).unwrap()).map_err(|error| error.to_string())
    })
    .unwrap();
    let mut maker = Maker::after(core.last_txid());
    maker.begin(|txid, edit| core.replay(txid, edit).unwrap());
    for _ in 0..files {
        maker.next_file(|txid, edit| core.replay(txid, edit).unwrap());
    }
    // The image makes the log before it superfluous.
    for segment in list_segments(&*env.fs, &meta.log()).unwrap() {
        env.fs.remove_file(&segment.path).unwrap();
    }
    let txid = core.checkpoint_begin();
    let header =
        ImageHeader { txid, epoch: facts.epoch, cluster_id: facts.cluster_id.clone(), state_digest: core.digest() };
    let mut image = ImageWriter::create(Arc::clone(&env.fs), &[Arc::clone(&meta)], header, 1).unwrap();
    let (mut pages, mut done) = (Vec::new(), false);
    while !done {
        done = core.checkpoint_slice(64, &mut pages);
        pages.drain(..).for_each(|page| image.page(&page).unwrap());
    }
    image.finish().unwrap();
    let sizes = LogSizes { segment_bytes: 64 << 20, step_bytes: 1 << 20 };
    let mut log = LogWriter::create(Arc::clone(&env.fs), vec![meta], facts, sizes, (txid, 0)).unwrap();
    while maker.last.0 < txid.0 + edits {
        maker.next_file(|txid, edit| log.append(txid, &edit).unwrap());
    }
    log.close().unwrap();
}
