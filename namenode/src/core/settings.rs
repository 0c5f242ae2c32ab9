//! Settings of the core: plain data, checked once at start.

use serde::{Deserialize, Serialize};

use cairn_proto::{
    BLOCK_SIZE_UNIT, DEFAULT_BLOCK_SIZE, DEFAULT_REPLICATION, MAX_BLOCK_SIZE, MAX_REPLICATION, MIN_BLOCK_SIZE,
};

/// Every knob of the core. Unknown keys are errors.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CoreSettings {
    /// User with all rights beside the one the cluster was formatted by; empty: only that one.
    pub superuser: String,
    /// Replicas of a file whose writer does not say. Lower: less disk, more loss; higher: the reverse.
    pub default_replication: u32,
    /// Block size of a file whose writer does not say, bytes. Larger: fewer blocks to keep, less parallel reading.
    pub default_block_size: u64,
    /// Smallest block size that a writer may ask for. Lower: a careless client can fill the memory with tiny blocks.
    pub min_block_size: u64,
    /// Largest block size.
    pub max_block_size: u64,
    /// Most replicas that a file may ask for.
    pub max_replication: u32,
    /// How often datanodes report. Longer: commands and failures take longer; shorter: more load on big clusters.
    pub heartbeat_interval_ms: u64,
    /// After this silence a node gets no new blocks and is read last. Too short: a busy node loses its share of writes.
    pub stale_interval_ms: u64,
    /// After this silence a node's replicas are copied elsewhere. Too short: needless copying after a pause; too long:
    /// blocks stay at risk.
    pub dead_interval_ms: u64,
    /// After this silence of a writer another one may take its file over.
    pub lease_soft_limit_ms: u64,
    /// After this silence the namenode closes the file itself.
    pub lease_hard_limit_ms: u64,
    /// How long a block of a dead writer, of which nothing was reported, waits for datanodes that are away and may hold it.
    /// Shorter: acknowledged bytes on a node under repair are given up; longer: the file stays open for a node that is gone.
    pub abandoned_block_wait_ms: u64,
    /// Whether runs of short blocks (left by appends and concats) are rewritten as one. Off: the namenode keeps each of them.
    pub merge_short_blocks: bool,
    /// A run has at least so many blocks. Fewer: more is rewritten for less.
    pub merge_min_blocks: usize,
    /// A file is left alone for this long after it was closed. Shorter: files that are appended to again are rewritten.
    pub merge_delay_ms: u64,
    /// Merges at a time in the whole cluster.
    pub max_merges: usize,
    /// Bytes that merges may rewrite in a second, in the whole cluster. Higher: they end sooner, and disturb more.
    pub merge_bytes_per_second: u64,
    /// Share of blocks that must have a reported replica before safe mode ends; the others are waited for until every known datanode has come or had
    /// the time to. Lower: reads of missing blocks at start.
    pub safemode_threshold: f64,
    /// How long safe mode stays after its conditions hold. Longer: fewer surprises from late nodes, slower start.
    pub safemode_extension_ms: u64,
    /// Replicas that must be reported before a block counts as written.
    pub min_replication: u32,
    /// How long deleted files stay in the trash; 0: there is none.
    pub trash_interval_ms: u64,
    /// How long `Complete` waits for replicas to be reported before it says "not yet".
    pub complete_wait_ms: u64,
    /// Most copies that one node sends or receives for repair at a time. Higher: faster repair, slower clients.
    pub max_repairs_per_node: u32,
    /// A copy that has not been reported after this is ordered anew. Too short: copies are made twice.
    pub repair_timeout_ms: u64,
    /// Repairs handed out in one turn of the owner.
    pub repairs_per_turn: usize,
    /// Blocks or inodes that a cursor (tree delete, node death, summary) handles in one turn: bounds the owner's pause.
    pub cursor_budget: usize,
    /// Replicas that one heartbeat answer tells a node to delete.
    pub deletions_per_heartbeat: usize,
    /// Full-report ranges that a node may have under way.
    pub report_credits: u32,
    /// Remembered answers of changing calls, at most. Lower: a repeated call may be applied twice.
    pub retry_cache_entries: usize,
    /// How long an answer of a client that tells no lowest unanswered call is remembered.
    pub retry_cache_ms: u64,
    /// Entries of one page of a listing, at most.
    pub list_limit: u32,
    /// The same when block locations are asked for.
    pub list_limit_with_locations: u32,
    /// Whether reads move the access time. On: every read becomes a write of the log.
    pub access_times: bool,
    /// A storage with less than this many times the block size free gets no new block.
    pub min_free_blocks: u64,
}

impl Default for CoreSettings {
    fn default() -> Self {
        Self {
            superuser: String::new(),
            default_replication: DEFAULT_REPLICATION,
            default_block_size: DEFAULT_BLOCK_SIZE,
            min_block_size: MIN_BLOCK_SIZE,
            max_block_size: MAX_BLOCK_SIZE,
            max_replication: MAX_REPLICATION,
            heartbeat_interval_ms: 1_000,
            stale_interval_ms: 5_000,
            dead_interval_ms: 30_000,
            lease_soft_limit_ms: 60_000,
            lease_hard_limit_ms: 300_000,
            abandoned_block_wait_ms: 24 * 3_600_000,
            merge_short_blocks: true,
            merge_min_blocks: 4,
            merge_delay_ms: 60_000,
            max_merges: 4,
            merge_bytes_per_second: 32 << 20,
            safemode_threshold: 0.999,
            safemode_extension_ms: 0,
            min_replication: 1,
            trash_interval_ms: 24 * 3_600_000,
            complete_wait_ms: 1_000,
            max_repairs_per_node: 16,
            repair_timeout_ms: 300_000,
            repairs_per_turn: 256,
            cursor_budget: 2_000,
            deletions_per_heartbeat: 1_000,
            report_credits: 4,
            retry_cache_entries: 1_000_000,
            retry_cache_ms: 600_000,
            list_limit: 1_000,
            list_limit_with_locations: 200,
            access_times: false,
            min_free_blocks: 1,
        }
    }
}

impl CoreSettings {
    /// Checks every value; the message names the key.
    pub fn validate(&self) -> Result<(), String> {
        let range = |key: &str, value: u64, low: u64, high: u64| {
            if (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(format!("{key} = {value} is outside {low} to {high}"))
            }
        };
        range("max_replication", self.max_replication.into(), 1, MAX_REPLICATION.into())?;
        range("default_replication", self.default_replication.into(), 1, self.max_replication.into())?;
        range("min_replication", self.min_replication.into(), 1, self.default_replication.into())?;
        range("max_block_size", self.max_block_size, BLOCK_SIZE_UNIT, MAX_BLOCK_SIZE)?;
        range("min_block_size", self.min_block_size, 1, self.max_block_size)?;
        range("default_block_size", self.default_block_size, self.min_block_size, self.max_block_size)?;
        if !self.default_block_size.is_multiple_of(BLOCK_SIZE_UNIT) {
            return Err(format!("default_block_size = {} is no multiple of 512", self.default_block_size));
        }
        let day = 24 * 3_600_000;
        range("heartbeat_interval_ms", self.heartbeat_interval_ms, 10, 60_000)?;
        range("stale_interval_ms", self.stale_interval_ms, self.heartbeat_interval_ms * 2, day)?;
        range("dead_interval_ms", self.dead_interval_ms, self.stale_interval_ms, 30 * day)?;
        range("lease_soft_limit_ms", self.lease_soft_limit_ms, 100, day)?;
        range("lease_hard_limit_ms", self.lease_hard_limit_ms, self.lease_soft_limit_ms, 30 * day)?;
        range("abandoned_block_wait_ms", self.abandoned_block_wait_ms, self.dead_interval_ms, 365 * day)?;
        range("merge_min_blocks", self.merge_min_blocks as u64, 2, 256)?;
        range("merge_delay_ms", self.merge_delay_ms, 0, 365 * day)?;
        range("max_merges", self.max_merges as u64, 1, 10_000)?;
        range("merge_bytes_per_second", self.merge_bytes_per_second, 1, u64::MAX)?;
        if !(0.0..=1.0).contains(&self.safemode_threshold) {
            return Err(format!("safemode_threshold = {} is outside 0 to 1", self.safemode_threshold));
        }
        range("complete_wait_ms", self.complete_wait_ms, 0, 60_000)?;
        range("max_repairs_per_node", self.max_repairs_per_node.into(), 1, 10_000)?;
        range("repair_timeout_ms", self.repair_timeout_ms, 1_000, day)?;
        range("repairs_per_turn", self.repairs_per_turn as u64, 1, 100_000)?;
        range("cursor_budget", self.cursor_budget as u64, 1, 1_000_000)?;
        range("deletions_per_heartbeat", self.deletions_per_heartbeat as u64, 1, 100_000)?;
        range("report_credits", self.report_credits.into(), 1, 64)?;
        range("retry_cache_entries", self.retry_cache_entries as u64, 1_000, 100_000_000)?;
        range("list_limit", self.list_limit.into(), 1, 10_000)?;
        range("list_limit_with_locations", self.list_limit_with_locations.into(), 1, 10_000)
    }
}
