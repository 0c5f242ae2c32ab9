//! What must hold, one file each. During the faults the clients check [`acked_bytes`] and [`acked_names`] with every operation (and that each
//! operation ends); after the heal all is checked on the quiet cluster and on its disks. A cluster that does not come to rest breaks the
//! invariant that did not hold at last (`comes_to_rest`: nobody could look).

pub mod acked_bytes;
pub mod acked_names;
pub mod generations;
pub mod known_replicas;
pub mod last_replica;
pub mod log_is_truth;
pub mod no_orphans;
pub mod replicas;
pub mod replication;
