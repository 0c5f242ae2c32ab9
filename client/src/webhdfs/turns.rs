//! Who may work now: so many at a time, and of one address only some of them, so that no client alone can hold the door.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Turns of all clients.
pub struct Turns {
    all: Arc<Semaphore>,
    of_one: u32,
    /// Those that have a turn, or wait for one.
    clients: Mutex<HashMap<IpAddr, Weak<Semaphore>>>,
}

/// The right to work, until it is dropped.
pub struct Turn {
    #[allow(dead_code, reason = "held as long as the turn")]
    permits: [OwnedSemaphorePermit; 2],
    /// Keeps the client known; it is forgotten with its last turn.
    #[allow(dead_code, reason = "held as long as the turn")]
    client: Arc<Semaphore>,
}

impl Turns {
    /// `all` at a time, `of_one` of each address.
    pub fn new(all: u32, of_one: u32) -> Arc<Self> {
        Arc::new(Self { all: Arc::new(Semaphore::new(all as usize)), of_one, clients: Mutex::default() })
    }

    /// Waits for a turn.
    pub async fn take(&self, peer: IpAddr) -> Turn {
        let client = self.client(peer.to_canonical());
        // The client's own limit first: whoever waits for itself takes nothing from others.
        let own = Self::permit(&client).await;
        let permits = [own, Self::permit(&self.all).await];
        Turn { permits, client }
    }

    #[allow(clippy::expect_used, reason = "these semaphores are never closed")]
    async fn permit(semaphore: &Arc<Semaphore>) -> OwnedSemaphorePermit {
        Arc::clone(semaphore).acquire_owned().await.expect("it is open")
    }

    fn client(&self, peer: IpAddr) -> Arc<Semaphore> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = clients.get(&peer).and_then(Weak::upgrade) {
            return known;
        }
        clients.retain(|_, client| client.strong_count() > 0);
        let new = Arc::new(Semaphore::new(self.of_one as usize));
        clients.insert(peer, Arc::downgrade(&new));
        new
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn peer(at: u8) -> IpAddr {
        [10, 0, 0, at].into()
    }

    #[tokio::test]
    async fn one_client_cannot_take_all_turns() {
        let turns = Turns::new(3, 2);
        let mut held = vec![turns.take(peer(1)).await, turns.take(peer(1)).await];
        let waits = |at: u8| turns.take(peer(at)).now_or_never().is_none();
        assert!(waits(1), "a third one of the same client");
        held.push(turns.take(peer(2)).await);
        assert!(waits(3), "no turn is left");
        held.remove(0);
        held.push(turns.take(peer(3)).await);
        drop(held);
        turns.take(peer(4)).await;
        assert_eq!(turns.clients.lock().unwrap().len(), 1, "who is gone is forgotten");
    }
}
