//! One connection to the first node of a pipeline: units go down it, acks come up.

use std::io::{self, IoSlice};
use std::time::Duration;

use bytes::Bytes;
use cairn_common::clock::Clock;
use cairn_common::net::{self, Conn};
use cairn_proto::dataplane::{self, Marker};
use cairn_proto::frame::{FRAME_HEADER_BYTES, Frame};
use cairn_proto::ids::BlockId;
use cairn_proto::{Error, ErrorCode, Result, pb};
use pb::data_request::Op;
use tokio::io::{AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;

use super::super::task::Task;
use super::super::{Block, FileSystem, Replica};

/// Units handed to the network in one call.
const UNITS_PER_WRITE: usize = 32;
/// Units that wait for the network; their bytes are bounded by the writer's window.
const QUEUED_UNITS: usize = 64;
/// When sending fails, the reason may already be on its way up.
const REASON_WAIT: Duration = Duration::from_millis(300);

/// Which node of the pipeline failed (0 = the first), and how.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) index: usize,
    pub(super) error: Error,
}

/// A frame or marker as it goes over the wire.
pub(super) struct WireUnit {
    header: [u8; FRAME_HEADER_BYTES],
    payload: Bytes,
}

impl WireUnit {
    pub(super) fn frame(frame: &Frame) -> Self {
        Self { header: frame.header_bytes, payload: frame.payload.clone() }
    }

    pub(super) fn marker(block: BlockId, marker: Marker) -> Self {
        Self { header: marker.encode(block), payload: Bytes::new() }
    }
}

/// What comes up.
pub(super) enum Event {
    Ack { kind: pb::AckKind, length: u64, behind: usize },
    Broken(Failure),
}

/// The connection; dropping it closes it.
pub(super) struct Link {
    pub(super) units: mpsc::Sender<WireUnit>,
    pub(super) events: mpsc::Receiver<Event>,
    _tasks: (Task<()>, Task<()>),
}

/// What a pipeline is opened for.
pub(super) struct Opening<'a> {
    pub(super) block: Block,
    pub(super) stage: pb::WriteStage,
    pub(super) targets: &'a [Replica],
    pub(super) block_size: u64,
    pub(super) keep_length: u64,
    pub(super) old_generation: u64,
    pub(super) token: Bytes,
}

impl Link {
    /// Opens a pipeline through all `targets`; also returns the storages that they use, in order.
    pub(super) async fn open(fs: &FileSystem, opening: Opening<'_>) -> Result<(Self, Vec<String>), Failure> {
        let at_first = |error| Failure { index: 0, error };
        let inner = &fs.inner;
        let Some((first, rest)) = opening.targets.split_first() else {
            return Err(at_first(Error::new(ErrorCode::NoTargets, "no datanode is left")));
        };
        let request = pb::DataRequest {
            op: Some(Op::Write(pb::WriteBlock {
                block: Some(opening.block),
                stage: opening.stage as i32,
                targets: rest.to_vec(),
                storage_id: first.storage_id.clone(),
                storage_type: first.storage_type,
                block_size: opening.block_size,
                client_name: inner.client_name.clone(),
                keep_length: opening.keep_length,
                old_generation: opening.old_generation,
                token: opening.token,
            })),
        };
        let mut conn = inner.datanodes.dial(&first.address).await.map_err(at_first)?;
        let patience = dataplane::set_up_patience(inner.settings.connect_timeout(), opening.targets.len());
        let talk = async {
            let sent = net::write_message(&mut conn, &request).await;
            sent.map_err(|error| Error::io(format!("sending to {}", first.address), &error))?;
            net::read_message::<pb::WriteReady>(&mut conn, &first.address).await
        };
        let ready = match inner.env.clock.timeout(patience, talk).await {
            Ok(ready) => ready.map_err(at_first)?,
            Err(elapsed) => {
                let text = format!("{} did not open its pipeline: {elapsed}", first.address);
                return Err(at_first(Error::new(ErrorCode::TimedOut, text)));
            }
        };
        if let Some(error) = ready.error {
            let index = (ready.failed_index as usize).min(rest.len());
            return Err(Failure { index, error: Error::from_wire(error) });
        }
        Ok((Self::start(conn, first.address.clone(), inner.env.clock.clone()), ready.storage_ids))
    }

    fn start(conn: Conn, address: String, clock: Clock) -> Self {
        let (read, write) = conn.split();
        let (units, queued) = mpsc::channel(QUEUED_UNITS);
        let (tell, events) = mpsc::channel(64);
        let acks = Task::spawn(read_acks(read, address.clone(), tell.clone()));
        let sends = Task::spawn(send_units(write, queued, address, tell, clock));
        Self { units, events, _tasks: (acks, sends) }
    }
}

/// Reads acks until the connection ends; what ends it is the last event.
async fn read_acks(mut conn: ReadHalf<Conn>, address: String, events: mpsc::Sender<Event>) -> Result<()> {
    loop {
        let ack = match net::read_message::<pb::WriteAck>(&mut conn, &address).await {
            Ok(ack) => ack,
            Err(error) => {
                // Nobody listens any more if the block is done.
                let _ = events.send(Event::Broken(Failure { index: 0, error })).await;
                return Ok(());
            }
        };
        let event = if ack.kind() == pb::AckKind::AckError {
            let unnamed = || Error::new(ErrorCode::Internal, format!("{address} ended the pipeline without a reason"));
            let error = ack.error.map_or_else(unnamed, Error::from_wire);
            Event::Broken(Failure { index: ack.failed_index as usize, error })
        } else {
            Event::Ack { kind: ack.kind(), length: ack.length, behind: ack.behind as usize }
        };
        if events.send(event).await.is_err() {
            return Ok(());
        }
    }
}

/// Has `source` send the first bytes of its replica to a node that joins the pipeline. An error comes with whose it is: 0 the source, 1 the
/// target.
pub(super) async fn transfer(
    fs: &FileSystem,
    source: &Replica,
    order: pb::TransferBlock,
) -> Result<(), (usize, Error)> {
    let inner = &fs.inner;
    let silence = Duration::from_millis(inner.settings.write_stall_ms);
    let mut conn = inner.datanodes.dial(&source.address).await.map_err(|error| (0, error))?;
    let request = pb::DataRequest { op: Some(Op::Transfer(order)) };
    let sent = net::write_message(&mut conn, &request).await;
    sent.map_err(|error| (0, Error::io(format!("sending to {}", source.address), &error)))?;
    loop {
        let read = net::read_message::<pb::WriteAck>(&mut conn, &source.address);
        let ack = match inner.env.clock.timeout(silence, read).await {
            Ok(ack) => ack.map_err(|error| (0, error))?,
            Err(elapsed) => {
                let text = format!("{} fell silent while it copied: {elapsed}", source.address);
                return Err((0, Error::new(ErrorCode::TimedOut, text)));
            }
        };
        match ack.kind() {
            pb::AckKind::AckFinished => return Ok(()),
            pb::AckKind::AckError => {
                let unnamed = || Error::new(ErrorCode::Internal, format!("{} gave no reason", source.address));
                return Err((ack.failed_index as usize, ack.error.map_or_else(unnamed, Error::from_wire)));
            }
            _ => {}
        }
    }
}

async fn send_units(
    mut conn: WriteHalf<Conn>,
    mut queued: mpsc::Receiver<WireUnit>,
    address: String,
    events: mpsc::Sender<Event>,
    clock: Clock,
) -> Result<()> {
    let mut batch = Vec::with_capacity(UNITS_PER_WRITE);
    while queued.recv_many(&mut batch, UNITS_PER_WRITE).await > 0 {
        if let Err(error) = write_units(&mut conn, &batch).await {
            clock.sleep(REASON_WAIT).await;
            let error = Error::io(format!("sending to {address}"), &error);
            let _ = events.send(Event::Broken(Failure { index: 0, error })).await;
            return Ok(());
        }
        batch.clear();
    }
    Ok(())
}

async fn write_units(conn: &mut (impl AsyncWrite + Unpin), units: &[WireUnit]) -> io::Result<()> {
    let mut slices: Vec<IoSlice<'_>> = Vec::with_capacity(units.len() * 2);
    for unit in units {
        slices.push(IoSlice::new(&unit.header));
        if !unit.payload.is_empty() {
            slices.push(IoSlice::new(&unit.payload));
        }
    }
    let mut rest = &mut slices[..];
    while !rest.is_empty() {
        let written = conn.write_vectored(rest).await?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        IoSlice::advance_slices(&mut rest, written);
    }
    conn.flush().await
}
