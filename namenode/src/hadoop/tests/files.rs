//! Writers and readers, as far as the namenode goes.

use super::*;

fn add(path: &str, file_id: u64, previous: Option<wire::ExtendedBlock>) -> wire::AddBlockRequest {
    let (src, client_name) = (path.to_owned(), "writer".to_owned());
    wire::AddBlockRequest { src, client_name, previous, file_id: Some(file_id), ..Default::default() }
}

fn written(block: &wire::ExtendedBlock, length: u64) -> wire::ExtendedBlock {
    wire::ExtendedBlock { num_bytes: Some(length), ..block.clone() }
}

/// Calls, each of which the namenode holds back for a second before it says "not yet".
const PATIENCE: u32 = 60;

impl World {
    pub async fn cluster() -> Self {
        let mut world = Self::start().await;
        for (id, rack) in [("n1", "/r1"), ("n2", "/r2"), ("n3", "/r2")] {
            world.node_up(id, rack).await;
        }
        world
    }

    async fn open(&self, path: &str) -> u64 {
        self.ask::<wire::CreateResponse>("create", create(path)).await.unwrap().fs.unwrap().file_id()
    }

    /// Asks again until earlier blocks are reported, as clients do.
    async fn add(&self, path: &str, file: u64, previous: Option<wire::ExtendedBlock>) -> wire::LocatedBlock {
        for _ in 0..PATIENCE {
            match self.ask::<wire::AddBlockResponse>("addBlock", add(path, file, previous.clone())).await {
                Err(error) if error.class.ends_with(".NotReplicatedYetException") => {}
                answer => return answer.unwrap().block,
            }
        }
        panic!("the last block of {path} is never reported");
    }

    /// Asks again until the last block is reported, as clients do.
    async fn close(&self, path: &str, file: u64, last: Option<wire::ExtendedBlock>) {
        for _ in 0..PATIENCE {
            if self.yes("complete", complete(path, file, last.clone())).await {
                return;
            }
        }
        panic!("{path} is never complete");
    }

    /// The nodes of a pipeline finish a block.
    async fn finish(&self, block: &wire::LocatedBlock, length: u64) -> wire::ExtendedBlock {
        for node in &block.locs {
            self.node(&node.id.datanode_uuid).holds(&block.b, length).await;
        }
        written(&block.b, length)
    }

    async fn locations(&self, path: &str, offset: u64, length: u64) -> wire::LocatedBlocks {
        let request = wire::GetBlockLocationsRequest { src: path.into(), offset, length };
        let answer: wire::GetBlockLocationsResponse = self.ask("getBlockLocations", request).await.unwrap();
        answer.locations.unwrap()
    }

    pub async fn write(&self, path: &str, lengths: &[u64]) -> Vec<wire::ExtendedBlock> {
        let file = self.open(path).await;
        let (mut previous, mut blocks) = (None, Vec::new());
        for length in lengths {
            let block = self.add(path, file, previous).await;
            blocks.push(self.finish(&block, *length).await);
            previous = blocks.last().cloned();
        }
        self.close(path, file, previous).await;
        blocks
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_is_written_block_by_block() {
    let world = World::cluster().await;
    let file = world.open("/f").await;
    let first = world.add("/f", file, None).await;
    assert_eq!((first.offset, first.b.num_bytes(), &*first.b.pool_id), (0, 0, &*world.namenode.pool_id));
    assert_eq!((first.locs.len(), first.storage_ids.len(), first.storage_types.len()), (2, 2, 2));
    assert_eq!(first.block_token, wire::Token::default());
    let node = &first.locs[0];
    assert!(node.id.ip_addr.starts_with("127.0.0.10") && node.id.host_name.ends_with(".example"), "{node:?}");
    assert_eq!((node.id.xfer_port, node.id.ipc_port, node.id.info_port), (9866, 9866, 9864));
    assert_eq!(world.add("/f", file, None).await.b, first.b, "a repeated call gets the same block");
    let open = world.locations("/f", 0, 10).await;
    assert_eq!((open.file_length, open.blocks.len()), (0, 0));
    assert_eq!((open.under_construction, open.is_last_block_complete), (true, false));
    assert_eq!(open.last_block.unwrap().b.block_id, first.b.block_id);
    let previous = world.finish(&first, BLOCK).await;
    let second = world.add("/f", file, Some(previous.clone())).await;
    assert_eq!(second.offset, BLOCK);
    let head = world.locations("/f", 0, 10).await;
    assert_eq!((head.file_length, head.blocks.len(), head.is_last_block_complete), (BLOCK, 1, false));
    assert_eq!(head.last_block.unwrap().b.block_id, second.b.block_id, "beyond the range that was asked for");
    let unfinished = written(&second.b, 100);
    let done = world.yes("complete", complete("/f", file, Some(unfinished.clone()))).await;
    assert!(!done, "nobody has reported it");
    world.finish(&second, 100).await;
    world.close("/f", file, Some(unfinished)).await;
    let all = world.locations("/f", 0, u64::MAX >> 1).await;
    assert_eq!((all.file_length, all.blocks.len(), all.is_last_block_complete), (BLOCK + 100, 2, true));
    assert_eq!(all.last_block.unwrap().b.num_bytes(), 100);
    assert!(world.yes("isFileClosed", wire::IsFileClosedRequest { src: "/f".into() }).await);
    let listed = wire::GetListingRequest { src: "/".into(), start_after: Bytes::new(), need_location: true };
    let listed: wire::GetListingResponse = world.ask("getListing", listed).await.unwrap();
    let entry = &listed.dir_list.unwrap().partial_listing[0];
    assert_eq!(entry.locations.as_ref().unwrap().blocks.len(), 2);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn appends_begin_a_block_behind_those_that_are_there() {
    let world = World::cluster().await;
    let blocks = world.write("/f", &[BLOCK, 10]).await;
    let append = wire::AppendRequest { src: "/f".into(), client_name: "writer".into(), flag: Some(4) };
    let opened: wire::AppendResponse = world.ask("append", append.clone()).await.unwrap();
    assert!(opened.block.is_none(), "finished blocks stay as they are");
    let stat = opened.stat.unwrap();
    assert_eq!(stat.length, BLOCK + 10);
    let third = world.add("/f", stat.file_id(), None).await;
    assert_eq!(third.offset, BLOCK + 10);
    assert!(blocks.iter().all(|block| block.block_id != third.b.block_id));
    let last = world.finish(&third, 5).await;
    world.close("/f", stat.file_id(), Some(last)).await;
    assert_eq!(world.info("/f").await.unwrap().length, BLOCK + 15);
    world.ask::<wire::AppendResponse>("append", append.clone()).await.unwrap();
    let other = wire::AppendRequest { client_name: "other".into(), ..append };
    let (class, message) = world.refused("append", other).await;
    assert_eq!(class, "org.apache.hadoop.hdfs.protocol.AlreadyBeingCreatedException");
    assert!(message.starts_with("Failed to APPEND_FILE /f for other on 127.0.0.1 because"), "{message}");
    let recover = wire::RecoverLeaseRequest { src: "/f".into(), client_name: "other".into() };
    assert!(world.yes("recoverLease", recover).await);
    let late = complete("/f", stat.file_id(), Some(wire::ExtendedBlock::default()));
    assert_eq!(world.refused("complete", late).await.0, "java.io.IOException", "a block of no pool");
    let late = add("/f", stat.file_id(), None);
    let expired = "org.apache.hadoop.hdfs.server.namenode.LeaseExpiredException";
    assert_eq!(world.refused("addBlock", late).await.0, expired);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_pipeline_goes_on_under_a_new_generation() {
    let world = World::cluster().await;
    let file = world.open("/f").await;
    let block = world.add("/f", file, None).await;
    let (old, writer) = (block.b.clone(), "writer".to_owned());
    let ask = wire::GetAdditionalDatanodeRequest {
        src: "/f".into(),
        blk: old.clone(),
        existings: block.locs[..1].to_vec(),
        existing_storage_uuids: block.storage_ids[..1].to_vec(),
        excludes: block.locs[1..].to_vec(),
        num_additional_nodes: 1,
        client_name: writer.clone(),
        file_id: Some(file),
    };
    let more: wire::GetAdditionalDatanodeResponse = world.ask("getAdditionalDatanode", ask).await.unwrap();
    let more = more.block;
    assert_eq!((more.locs.len(), more.storage_ids.len(), more.offset), (2, 2, u64::MAX));
    assert_eq!(more.locs[0].id, block.locs[0].id);
    assert!(block.locs.iter().all(|node| node.id != more.locs[1].id));
    let renew = wire::UpdateBlockForPipelineRequest { block: old.clone(), client_name: writer.clone() };
    let renewed: wire::UpdateBlockForPipelineResponse = world.ask("updateBlockForPipeline", renew).await.unwrap();
    let new = renewed.block.b;
    assert_eq!(new.block_id, old.block_id);
    assert!(new.generation_stamp > old.generation_stamp);
    let update = wire::UpdatePipelineRequest {
        client_name: writer,
        old_block: old.clone(),
        new_block: written(&new, 50),
        new_nodes: more.locs.iter().map(|node| node.id.clone()).collect(),
        storage_ids: more.storage_ids.clone(),
    };
    let call = world.call_of(&process::user_name(), "updatePipeline");
    world.send::<()>(&call, &update).await.unwrap();
    world.send::<()>(&call, &update).await.unwrap();
    let stale = world.refused("complete", complete("/f", file, Some(written(&old, 50)))).await;
    assert_eq!(stale.0, "java.io.IOException");
    for node in &more.locs {
        world.node(&node.id.datanode_uuid).holds(&new, 50).await;
    }
    world.close("/f", file, Some(written(&new, 50))).await;
    let found = world.locations("/f", 0, 1).await;
    assert_eq!(found.blocks[0].b, written(&new, 50));
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abandoned_block_makes_room_for_another() {
    let world = World::cluster().await;
    let file = world.open("/f").await;
    let first = world.add("/f", file, None).await;
    let abandon = wire::AbandonBlockRequest {
        b: first.b.clone(),
        src: "/f".into(),
        holder: "writer".into(),
        file_id: Some(file),
    };
    world.ask::<()>("abandonBlock", abandon.clone()).await.unwrap();
    let without = wire::AddBlockRequest { exclude_nodes: first.locs[..1].to_vec(), ..add("/f", file, None) };
    let second: wire::AddBlockResponse = world.ask("addBlock", without).await.unwrap();
    assert_ne!(second.block.b.block_id, first.b.block_id);
    assert!(second.block.locs.iter().all(|node| node.id != first.locs[0].id));
    let nowhere =
        wire::AddBlockRequest { exclude_nodes: [first.locs, second.block.locs.clone()].concat(), ..add("/g", 0, None) };
    world.open("/g").await;
    let (class, message) = world.refused("addBlock", nowhere).await;
    assert_eq!(class, "java.io.IOException");
    let words = "File /g could only be replicated to 0 nodes instead of minReplication (=1).";
    assert!(message.starts_with(words), "{message}");
    let foreign = wire::ExtendedBlock { pool_id: "BP-elsewhere".into(), ..second.block.b };
    let (_, message) = world.refused("abandonBlock", wire::AbandonBlockRequest { b: foreign, ..abandon }).await;
    assert!(message.contains("BP-elsewhere"), "{message}");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_was_replaced_or_deleted_is_not_written_on() {
    let world = World::cluster().await;
    let file = world.open("/f").await;
    world.add("/f", file, None).await;
    let flags = wire::CreateFlag::Create as u32 | wire::CreateFlag::Overwrite as u32;
    let replace = wire::CreateRequest { create_flag: flags, client_name: "other".into(), ..create("/f") };
    world.ask::<wire::CreateResponse>("create", replace).await.unwrap();
    let expired = "org.apache.hadoop.hdfs.server.namenode.LeaseExpiredException";
    let (class, message) = world.refused("addBlock", add("/f", file, None)).await;
    assert_eq!(class, expired);
    let words = "File does not exist. Holder writer does not have any open files.";
    assert!(message.starts_with("No lease on") && message.ends_with(words), "{message}");
    // A file may be renamed under its writer.
    let moved = world.open("/m").await;
    let block = world.add("/m", moved, None).await;
    assert!(world.yes("rename", wire::RenameRequest { src: "/m".into(), dst: "/moved".into() }).await);
    let last = world.finish(&block, 7).await;
    world.close("/m", moved, Some(last)).await;
    assert_eq!(world.info("/moved").await.unwrap().length, 7);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_blocks_of_a_long_file_are_told() {
    let world = World::cluster().await;
    // More than the core gives at a time.
    world.write("/f", &[512; 450]).await;
    let all = world.locations("/f", 0, u64::MAX >> 1).await;
    assert_eq!((all.blocks.len(), all.file_length, all.is_last_block_complete), (450, 450 * 512, true));
    assert!(all.blocks.windows(2).all(|pair| pair[1].offset == pair[0].offset + 512));
    assert_eq!(world.locations("/f", 10 * 512, 300 * 512).await.blocks.len(), 300);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_syncs_must_hold_the_file_and_what_it_says_is_shown() {
    let world = World::cluster().await;
    let file = world.open("/f").await;
    let first = world.add("/f", file, None).await;
    let previous = world.finish(&first, BLOCK).await;
    let second = world.add("/f", file, Some(previous)).await;
    let sync = |client: &str, length: i64| wire::FsyncRequest {
        src: "/f".into(),
        client: client.into(),
        last_block_length: Some(length),
        file_id: Some(file),
    };
    world.ask::<()>("fsync", sync("writer", -1)).await.unwrap();
    assert_eq!(world.info("/f").await.unwrap().length, BLOCK);
    world.ask::<()>("fsync", sync("writer", 700)).await.unwrap();
    world.ask::<()>("fsync", sync("writer", 600)).await.unwrap();
    assert_eq!(world.info("/f").await.unwrap().length, BLOCK + 700);
    // Whoever asks where the bytes of that length lie finds them all; readers ask the datanodes.
    let found = world.locations("/f", 0, 2 * BLOCK).await;
    assert_eq!((found.file_length, found.is_last_block_complete), (BLOCK, false));
    let lengths: Vec<u64> = found.blocks.iter().map(|block| block.b.num_bytes()).collect();
    assert_eq!(lengths, [BLOCK, 700]);
    assert_eq!(found.blocks[1].b.block_id, second.b.block_id);
    let expired = "org.apache.hadoop.hdfs.server.namenode.LeaseExpiredException";
    assert_eq!(world.refused("fsync", sync("other", 700)).await.0, expired);
    assert_eq!(world.refused("fsync", sync("writer", 1 << 40)).await.0, "java.io.IOException");
    let last = world.finish(&second, 900).await;
    world.close("/f", file, Some(last)).await;
    assert_eq!(world.info("/f").await.unwrap().length, BLOCK + 900);
    assert_eq!(world.refused("fsync", sync("writer", 900)).await.0, expired);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_inside_a_block_shows_when_it_is_made() {
    let world = World::cluster().await;
    world.write("/d/f", &[BLOCK, 1_000]).await;
    world.write("/d/g", &[10]).await;
    let cut = wire::TruncateRequest { src: "/d/f".into(), new_length: BLOCK + 300, client_name: "writer".into() };
    assert!(!world.yes("truncate", cut).await, "the last block is being cut");
    // So a client that waits for the length (`hadoop fs -truncate -w`) waits until the file can be written again.
    assert_eq!(world.info("/d/f").await.unwrap().length, BLOCK + 1_000);
    let closed = wire::IsFileClosedRequest { src: "/d/f".into() };
    assert!(!world.yes("isFileClosed", closed.clone()).await);
    let found = world.locations("/d/f", 0, 2 * BLOCK).await;
    assert_eq!(found.file_length, BLOCK + 300, "readers see no more");
    assert_eq!(found.blocks[1].b.num_bytes(), 1_000);
    let join = wire::ConcatRequest { trg: "/d/f".into(), srcs: vec!["/d/g".into()] };
    let (class, message) = world.refused("concat", join.clone()).await;
    assert_eq!(class, "org.apache.hadoop.HadoopIllegalArgumentException");
    assert!(message.contains("under construction"), "{message}");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn favored_nodes_get_the_replicas() {
    let world = World::cluster().await;
    let file = world.open("/f").await;
    let favored_nodes = vec!["n3.example:9866".into(), "nowhere:1".into(), "127.0.0.102:9866".into()];
    let wanted = wire::AddBlockRequest { favored_nodes, ..add("/f", file, None) };
    let block = world.ask::<wire::AddBlockResponse>("addBlock", wanted).await.unwrap().block;
    let mut nodes: Vec<&str> = block.locs.iter().map(|node| &*node.id.datanode_uuid).collect();
    nodes.sort_unstable();
    assert_eq!(nodes, ["n2", "n3"]);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cluster_reports_itself() {
    let world = World::cluster().await;
    let stats: wire::GetFsStatsResponse = world.ask("getFsStats", ()).await.unwrap();
    assert_eq!((stats.capacity, stats.remaining, stats.missing_blocks), (3 << 40, 3 << 39, 0));
    let report = async |kind: wire::DatanodeReportType| {
        let request = wire::GetDatanodeReportRequest { r#type: kind as i32 };
        world.ask::<wire::GetDatanodeReportResponse>("getDatanodeReport", request).await.unwrap().di
    };
    let live = report(wire::DatanodeReportType::ReportLive).await;
    assert_eq!((live.len(), live[0].id.info_port, live[0].capacity()), (3, 9864, 1 << 40));
    assert!(report(wire::DatanodeReportType::ReportDead).await.is_empty());
    world.end().await;
}
