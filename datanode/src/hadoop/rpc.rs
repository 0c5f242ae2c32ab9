//! `ClientDatanodeProtocol` by Hadoop RPC, on the data port too: what a client must know of a block that is being written.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use cairn_common::net::Conn;
use cairn_common::net::hadoop::{self as server, Answer, Call, Limits, Protocol, RpcError};
use cairn_proto::hadoop::{GetReplicaVisibleLengthRequest, GetReplicaVisibleLengthResponse};
use prost::Message;

use super::check_block;
use crate::transfer::Transfer;

const PROTOCOL: &str = "org.apache.hadoop.hdfs.protocol.ClientDatanodeProtocol";
/// Requests name one block.
const FRAME_BYTES: usize = 64 << 10;

struct ClientDatanode(Arc<Transfer>);

/// Serves a connection that opened with `hrpc`.
pub async fn serve_rpc(transfer: Arc<Transfer>, conn: Conn) {
    let limits = Limits { calls: 16, frame_bytes: FRAME_BYTES, request_bytes: 4 * FRAME_BYTES, ..Limits::default() };
    let (clock, stopping) = (transfer.env.clock.clone(), Arc::clone(&transfer));
    let protocol = Arc::new(ClientDatanode(transfer));
    server::serve(conn, protocol, clock, limits, async move { stopping.stopping().await }).await;
}

impl Protocol for ClientDatanode {
    fn name(&self) -> &'static str {
        PROTOCOL
    }

    /// Nothing here depends on who asks.
    fn may_act_for(&self, _real_user: &str, _user: &str) -> bool {
        true
    }

    fn call<'a>(&'a self, call: &'a Call, request: Bytes) -> Pin<Box<dyn Future<Output = Answer> + Send + 'a>> {
        Box::pin(async move {
            match call.method.as_str() {
                "getReplicaVisibleLength" => self.visible_length(call, request).await,
                other => Err(RpcError::no_such_method(other, PROTOCOL)),
            }
        })
    }
}

impl ClientDatanode {
    async fn visible_length(&self, call: &Call, request: Bytes) -> Answer {
        let request = GetReplicaVisibleLengthRequest::decode(request)
            .map_err(|error| RpcError::bad_request(&call.method, error))?;
        let (block, generation) = check_block(&self.0, &request.block)?;
        let store = &self.0.store;
        let replica = store.read(block, generation).await.map_err(|error| store.out_of_reach(block, error))?;
        // As in HDFS, one that was found at a start says "-1": it may have lost what others still have.
        let length = if replica.found_at_start { u64::MAX } else { replica.length };
        Ok(GetReplicaVisibleLengthResponse { length }.encode_to_vec())
    }
}
