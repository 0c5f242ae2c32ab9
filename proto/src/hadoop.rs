//! Messages of Hadoop's protocols, generated from `proto/hadoop/*.proto`: RPC, `ClientProtocol`, data transfer,
//! `ClientDatanodeProtocol`.
//!
//! Message text and names are our own; numbers and types are those of the public wire format. What a peer leaves out reads as
//! its default, required fields too: whoever needs one checks it.

#[allow(missing_docs, clippy::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/hadoop.rs"));
}

pub use generated::*;

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;

    fn hex(message: &impl prost::Message) -> String {
        message.encode_length_delimited_to_vec().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn answers_have_the_bytes_that_clients_were_seen_to_take() {
        let written = BlockOpResponse { status: 0, first_bad_link: Some(String::new()), ..BlockOpResponse::default() };
        assert_eq!(hex(&written), "0408001200");
        let checksum = Checksum { r#type: ChecksumType::ChecksumCrc32c as i32, bytes_per_checksum: 512 };
        let info = ReadOpChecksumInfo { checksum, chunk_offset: 0 };
        let read = BlockOpResponse { read_op_checksum_info: Some(info), ..BlockOpResponse::default() };
        assert_eq!(hex(&read), "0d080022090a0508021080041000");
        let last = PacketHeader { last_packet_in_block: true, ..PacketHeader::default() };
        assert_eq!(last.encoded_len(), 25);
        assert_eq!(PacketHeader { sync_block: Some(true), ..last }.encoded_len(), 27);
        let ack = PipelineAck { seqno: 0, reply: vec![0], downstream_ack_time_nanos: Some(0), flag: vec![0] };
        assert_eq!(hex(&ack), "09080010001800220100");
        let checked = ClientReadStatus { status: DataStatus::StatusChecksumOk as i32 };
        assert_eq!(hex(&checked), "020806");
    }

    #[test]
    fn negative_call_ids_travel_as_both_kinds_of_number() {
        let request = RpcRequestHeader { call_id: -3, retry_count: Some(-1), ..RpcRequestHeader::default() };
        assert_eq!(hex(&request), "06180522002801");
        let reply = RpcResponseHeader { call_id: -33i32 as u32, ..RpcResponseHeader::default() };
        let back = RpcResponseHeader::decode(&*reply.encode_to_vec()).unwrap();
        assert_eq!(back.call_id as i32, -33);
    }
}
