//! Whoever writes through this node: a peer on a connection, or a door of this node that makes the frames itself.

use std::io;

use cairn_common::net::{self, Conn};
use cairn_proto::{Result, pb};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;

use super::wire::{Item, UnitReader};

/// Where frames and markers come from.
pub enum Down {
    /// A connection.
    Wire(UnitReader<ReadHalf<Conn>>),
    /// A door of this node. It sends verified frames that follow on each other; that it is gone ends the write as a lost connection does.
    Door(mpsc::Receiver<Item>),
}

impl Down {
    /// The next item; errors as of [`UnitReader::next`].
    pub async fn next(&mut self) -> Result<Item> {
        match self {
            Self::Wire(units) => units.next().await,
            Self::Door(items) => Ok(items.recv().await.unwrap_or(Item::End)),
        }
    }

    /// Reads and drops what still comes, so that a peer gets to read why the write ended.
    pub async fn drain(&mut self) {
        match self {
            Self::Wire(units) => drain(units.conn()).await,
            Self::Door(items) => items.close(),
        }
    }
}

/// Where acks go.
pub enum Up {
    /// A connection.
    Wire(WriteHalf<Conn>),
    /// A door of this node.
    Door(mpsc::Sender<pb::WriteAck>),
}

impl Up {
    /// Sends an ack.
    pub async fn tell(&mut self, ack: pb::WriteAck) -> io::Result<()> {
        match self {
            Self::Wire(conn) => net::write_message(conn, &ack).await,
            Self::Door(acks) => acks.send(ack).await.map_err(|_| io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// No more acks will come.
    pub async fn shutdown(&mut self) {
        if let Self::Wire(conn) = self {
            let _ = conn.shutdown().await;
        }
    }
}

/// Reads and drops until the peer closes.
pub async fn drain(conn: &mut (impl tokio::io::AsyncRead + Unpin)) {
    let mut bytes = vec![0; 64 << 10];
    while conn.read(&mut bytes).await.is_ok_and(|n| n > 0) {}
}
