//! Keeps the client's lease alive while it has a file open.

use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use cairn_proto::pb;

use super::Inner;
use super::namenode::{Patience, lock};

/// How many files are open; one task renews for all of them.
#[derive(Default)]
pub(crate) struct Leases {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    open_files: usize,
    renewing: bool,
}

/// One open file.
pub(crate) struct LeaseGuard {
    inner: Weak<Inner>,
}

impl Drop for LeaseGuard {
    fn drop(&mut self) {
        if let Some(inner) = self.inner.upgrade() {
            lock(&inner.leases.state).open_files -= 1;
        }
    }
}

/// Counts one more open file until the guard is dropped.
pub(crate) fn hold(inner: &Arc<Inner>) -> LeaseGuard {
    let mut state = lock(&inner.leases.state);
    state.open_files += 1;
    if !state.renewing {
        state.renewing = true;
        tokio::spawn(renew(Arc::downgrade(inner)));
    }
    LeaseGuard { inner: Arc::downgrade(inner) }
}

/// Ends when no file is open, or when the client is gone.
async fn renew(client: Weak<Inner>) {
    loop {
        let Some((clock, interval)) = client
            .upgrade()
            .map(|inner| (inner.env.clock.clone(), Duration::from_millis(inner.settings.lease_renew_ms)))
        else {
            return;
        };
        clock.sleep(interval).await;
        let Some(inner) = client.upgrade() else { return };
        {
            let mut state = lock(&inner.leases.state);
            if state.open_files == 0 {
                state.renewing = false;
                return;
            }
        }
        let request = pb::RenewLeaseRequest { client_name: inner.client_name.clone() };
        let send =
            |mut stub: pb::namenode_client::NamenodeClient<_>, request| async move { stub.renew_lease(request).await };
        // The next round tries again; a lease lasts many rounds, and a lost one is reported by the writer's next call.
        if let Err(error) = inner.namenode.call(Patience::Once, request, send).await {
            tracing::warn!(%error, "the lease could not be renewed");
        }
    }
}
