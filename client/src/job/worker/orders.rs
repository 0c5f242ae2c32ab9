//! What the datanode orders, read beside the task that runs.

use std::sync::{Arc, Mutex, PoisonError};

use cairn_common::net::read_message;
use cairn_proto::pb::worker_order::Order;
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::net::unix::pipe::Receiver;
use tokio::sync::{Notify, mpsc};

/// Orders that were read and are not looked at yet.
const AHEAD: usize = 4;

/// The next order; `None` when the datanode has let go of this worker. Not to be dropped before it is done.
pub async fn next_order(orders: &mut Receiver) -> Result<Option<Order>> {
    match read_message::<pb::WorkerOrder>(orders, "the datanode").await {
        Ok(order) => order.order.map(Some).ok_or_else(out_of_turn),
        Err(error) if error.code() == ErrorCode::Unreachable => Ok(None),
        Err(error) => Err(error),
    }
}

pub fn out_of_turn() -> Error {
    Error::new(ErrorCode::InvalidArgument, "an order out of turn")
}

/// Orders, read by a task of their own, so that one can be waited for beside other things.
pub struct Orders {
    receiver: mpsc::Receiver<Result<Order>>,
}

impl Orders {
    /// Takes over the pipe.
    pub fn read(mut pipe: Receiver) -> Self {
        let (sender, receiver) = mpsc::channel(AHEAD);
        tokio::spawn(async move {
            while let Some(order) = next_order(&mut pipe).await.transpose() {
                let failed = order.is_err();
                if sender.send(order).await.is_err() || failed {
                    return;
                }
            }
        });
        Self { receiver }
    }

    /// The next order; `None` when there will be no other.
    pub async fn next(&mut self) -> Result<Option<Order>> {
        self.receiver.recv().await.transpose()
    }
}

/// Map outputs that a reduce is told of while it runs.
#[derive(Clone, Default)]
pub struct Inbox {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    inputs: Mutex<Vec<pb::MapOutputLocation>>,
    come: Notify,
}

impl Inbox {
    /// For the task to find.
    pub fn put(&self, inputs: Vec<pb::MapOutputLocation>) {
        self.shared.inputs.lock().unwrap_or_else(PoisonError::into_inner).extend(inputs);
        self.shared.come.notify_one();
    }

    /// All that came since this was last asked; waits for the first.
    pub async fn take(&self) -> Vec<pb::MapOutputLocation> {
        loop {
            let inputs = std::mem::take(&mut *self.shared.inputs.lock().unwrap_or_else(PoisonError::into_inner));
            if !inputs.is_empty() {
                return inputs;
            }
            self.shared.come.notified().await;
        }
    }
}
