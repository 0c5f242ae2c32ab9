//! The cluster as a whole: defaults, numbers, datanodes, safe mode.

use cairn_proto::hadoop as wire;
use cairn_proto::{Result, pb};

use super::{Asked, Done, convert};

/// What HDFS's clients write by default: sums over 512 bytes, packets of 64 KiB.
const BYTES_PER_CHECKSUM: u32 = 512;
const WRITE_PACKET_BYTES: u32 = 64 << 10;
const FILE_BUFFER_BYTES: u32 = 4_096;

impl Asked<'_> {
    pub(super) async fn server_defaults(&self, (): ()) -> Done<wire::GetServerDefaultsResponse> {
        let defaults: pb::GetServerDefaultsResponse = self.ask(pb::GetServerDefaultsRequest {}).await?;
        let server_defaults = wire::FsServerDefaults {
            block_size: defaults.block_size,
            bytes_per_checksum: BYTES_PER_CHECKSUM,
            write_packet_size: WRITE_PACKET_BYTES,
            replication: defaults.replication,
            file_buffer_size: FILE_BUFFER_BYTES,
            encrypt_data_transfer: Some(false),
            trash_interval: Some(defaults.trash_interval_ms / 60_000),
            // Said aloud: the protocol's default is another one.
            checksum_type: Some(wire::ChecksumType::ChecksumCrc32c as i32),
            key_provider_uri: Some(String::new()),
            policy_id: Some(0),
            snapshot_trash_root_enabled: Some(false),
        };
        Ok(wire::GetServerDefaultsResponse { server_defaults })
    }

    async fn report(&self) -> Result<pb::ClusterReportResponse> {
        self.ask(pb::ClusterReportRequest {}).await
    }

    pub(super) async fn fs_stats(&self, (): ()) -> Done<wire::GetFsStatsResponse> {
        let report = self.report().await?;
        Ok(wire::GetFsStatsResponse {
            capacity: report.capacity,
            used: report.used,
            remaining: report.remaining,
            under_replicated: report.under_replicated,
            corrupt_blocks: report.corrupt,
            missing_blocks: report.missing,
            missing_repl_one_blocks: Some(0),
            blocks_in_future: Some(0),
            pending_deletion_blocks: Some(report.pending_deletion),
        })
    }

    pub(super) async fn replicated_block_stats(&self, (): ()) -> Done<wire::GetFsReplicatedBlockStatsResponse> {
        let report = self.report().await?;
        Ok(wire::GetFsReplicatedBlockStatsResponse {
            low_redundancy: report.under_replicated,
            corrupt_blocks: report.corrupt,
            missing_blocks: report.missing,
            missing_repl_one_blocks: 0,
            blocks_in_future: 0,
            pending_deletion_blocks: report.pending_deletion,
        })
    }

    /// There are no groups of erasure-coded blocks.
    pub(super) async fn block_group_stats(&self, (): ()) -> Done<wire::GetFsEcBlockGroupStatsResponse> {
        Ok(wire::GetFsEcBlockGroupStatsResponse::default())
    }

    pub(super) async fn datanode_report(
        &self,
        request: wire::GetDatanodeReportRequest,
    ) -> Done<wire::GetDatanodeReportResponse> {
        let wanted = request.r#type();
        let report = self.report().await?;
        let nodes = report.nodes.iter().filter(|node| is_wanted(wanted, node.state()));
        Ok(wire::GetDatanodeReportResponse { di: nodes.map(datanode).collect() })
    }

    /// Slowness is not measured here.
    pub(super) async fn slow_datanodes(&self, (): ()) -> Done<wire::GetDatanodeReportResponse> {
        Ok(wire::GetDatanodeReportResponse::default())
    }

    pub(super) async fn set_safe_mode(&self, request: wire::SetSafeModeRequest) -> Done<wire::BoolResponse> {
        let action = match request.action() {
            wire::SafeModeAction::SafemodeGet => pb::SafeModeAction::SafemodeGet,
            wire::SafeModeAction::SafemodeEnter => pb::SafeModeAction::SafemodeEnter,
            wire::SafeModeAction::SafemodeLeave | wire::SafeModeAction::SafemodeForceExit => {
                pb::SafeModeAction::SafemodeLeave
            }
        };
        let answer: pb::SafeModeResponse = self.ask(pb::SafeModeRequest { action: action as i32 }).await?;
        Ok(wire::BoolResponse { result: answer.on })
    }

    /// An image is written while the namenode serves; HDFS asks for safe mode first, which does no harm.
    pub(super) async fn save_namespace(&self, (): ()) -> Done<wire::SaveNamespaceResponse> {
        self.door.owner.checkpoint(self.caller.clone()).await?;
        Ok(wire::SaveNamespaceResponse { saved: Some(true) })
    }

    /// Every answer is as new as the log.
    pub(super) async fn msync(&self, (): ()) -> Done<()> {
        Ok(())
    }

    pub(super) async fn ha_state(&self, (): ()) -> Done<wire::HaServiceStateResponse> {
        Ok(wire::HaServiceStateResponse { state: wire::HaServiceState::Active as i32 })
    }
}

fn is_wanted(wanted: wire::DatanodeReportType, state: pb::NodeState) -> bool {
    use pb::NodeState as S;
    use wire::DatanodeReportType as R;
    match wanted {
        R::ReportAll => true,
        R::ReportLive => state != S::Dead,
        R::ReportDead => state == S::Dead,
        R::ReportDecommissioning => state == S::Decommissioning,
        R::ReportInMaintenance => state == S::Maintenance,
        R::ReportEnteringMaintenance => false,
    }
}

fn datanode(node: &pb::NodeReport) -> wire::DatanodeInfo {
    use pb::NodeState as S;
    use wire::datanode_info::AdminState as A;
    let state = match node.state() {
        S::Live | S::Stale | S::Dead => A::Normal,
        S::Decommissioning => A::DecommissionInProgress,
        S::Decommissioned => A::Decommissioned,
        S::Maintenance => A::InMaintenance,
    };
    wire::DatanodeInfo {
        id: convert::datanode_id(&node.id, &node.host, &node.address, convert::port_of(&node.http_address)),
        capacity: Some(node.capacity),
        dfs_used: Some(node.used),
        remaining: Some(node.remaining),
        block_pool_used: Some(node.used),
        last_update: Some(node.last_heartbeat_ms),
        xceiver_count: Some(node.active_transfers),
        location: Some(node.rack.clone()),
        non_dfs_used: Some(node.capacity.saturating_sub(node.used).saturating_sub(node.remaining)),
        admin_state: Some(state as i32),
        num_blocks: Some(u32::try_from(node.blocks).unwrap_or(u32::MAX)),
        ..wire::DatanodeInfo::default()
    }
}
