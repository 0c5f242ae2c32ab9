//! What a seed decides beforehand: the shape of the cluster, and the faults with their times. Data, not code.
//!
//! # Bounds
//! What was acknowledged must survive, so: any number of machines may lose power, all at once too, since `close` and `hsync` are durable; but
//! at most one datanode (the sick one) has disk errors, and bits are flipped only in a replica that has two good siblings
//! (and are flipped back if those go although it was read a moment before it rotted: nobody could have seen it).

use cairn_common::entropy::Entropy;

/// The cluster.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Datanodes, 3 to 5, on two racks.
    pub datanodes: u64,
    /// Clients.
    pub clients: u64,
    /// Metadata directories of the namenode.
    pub name_dirs: u64,
    /// Longest delay of a message, ms.
    pub latency_ms: u64,
    /// Longest delay of a disk operation or of an owner's turn, ms.
    pub jitter_ms: u64,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Longest pause of a client between two operations, ms.
    pub pause_ms: u64,
    /// Edits between two images of the namenode.
    pub checkpoint_edits: u64,
    /// Clients reduce files to no fewer replicas.
    pub least_replicas: u32,
    /// Replicas in one message of a datanode's full report. Few: it takes so many turns that much changes meanwhile.
    pub report_range: usize,
    /// How long the safety phase lasts, ms.
    pub safety_ms: u64,
}

/// A host.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Host {
    /// The namenode.
    Namenode,
    /// A datanode, from 0.
    Datanode(u64),
    /// A client, from 0.
    Client(u64),
}

impl Host {
    /// Its name in the network.
    pub fn name(self) -> String {
        match self {
            Self::Namenode => "nn".into(),
            Self::Datanode(number) => format!("dn{number}"),
            Self::Client(number) => format!("c{number}"),
        }
    }
}

/// What happens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Messages between two hosts vanish, with the connections that they belong to.
    Cut { a: Host, b: Host },
    /// The same in one direction.
    CutOneWay { from: Host, to: Host },
    /// All messages from and to a host vanish.
    Isolate { host: Host },
    /// Messages between two hosts are kept until the end, and arrive then.
    Hold { a: Host, b: Host },
    /// The same with all: as if the machine stood still.
    Freeze { host: Host },
    /// Messages of a host take this long.
    Slow { host: Host, latency_ms: u64 },
    /// The process is killed; what it wrote stays.
    Kill { host: Host },
    /// The machine loses power; what was not synced is lost in part.
    PowerCut { host: Host },
    /// All machines that store anything lose power.
    PowerCutAll,
    /// The machine loses power just before the nth sync from now.
    CutAtSync { host: Host, nth: u64 },
    /// The same, and all other machines that store anything with it.
    AllCutAtSync { host: Host, nth: u64 },
    /// The process is told to end, and started again.
    Restart { host: Host },
    /// Operations of its disk fail, a number of times.
    DiskError { host: Host, op: DiskOp, after: u64, times: u64 },
    /// Whatever its process does, turns of its owners and disk operations, takes up to this long: the machine has too much to do, or a slow disk.
    Busy { host: Host, jitter_ms: u64 },
    /// The disk of the namenode's log takes up to this long; the namenode itself is as fast as ever.
    LateLog { jitter_ms: u64 },
    /// Its disk is full.
    DiskFull { host: Host },
    /// Bits of finalized replicas flip.
    Flip { host: Host, bytes: u64 },
    /// Its wall clock jumps.
    WallJump { host: Host, by_ms: i64 },
}

/// Which operations fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskOp {
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Syncing.
    Sync,
    /// Opening, renaming, removing.
    Name,
}

/// A fault: when, what, for how long.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// When it begins, virtual ms.
    pub at_ms: u64,
    /// How long it lasts (a process or machine: how long it is down), ms.
    pub for_ms: u64,
    /// What.
    pub kind: Kind,
}

/// All of it.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The cluster.
    pub shape: Shape,
    /// In the order of their times.
    pub faults: Vec<Fault>,
}

/// Time for the cluster to come up before the first fault, ms.
const QUIET_MS: u64 = 2_000;

const SECOND_SOURCE: u64 = 0x62;

struct Draw {
    entropy: Entropy,
    shape: Shape,
    sick: u64,
}

impl Plan {
    /// The plan of a seed.
    pub fn of(seed: u64, with_faults: bool) -> Self {
        let entropy = Entropy::seeded(seed ^ 0x9_1A17);
        let between = |low: u64, high: u64| low + entropy.below(high - low + 1);
        let shape = Shape {
            datanodes: between(3, 5),
            clients: between(1, 3),
            name_dirs: between(1, 2),
            latency_ms: [2, 5, 10, 25][between(0, 3) as usize],
            jitter_ms: [0, 2, 6, 15][between(0, 3) as usize],
            block_bytes: [4 << 10, 16 << 10, 64 << 10][between(0, 2) as usize],
            pause_ms: [100, 400, 1_500][between(0, 2) as usize],
            checkpoint_edits: [20, 60, 1_000_000][between(0, 2) as usize],
            least_replicas: 2,
            report_range: 4_096,
            safety_ms: between(6, 14) * 1_000,
        };
        let count = match entropy.below(10) {
            0 => 0,
            1..=3 => between(1, 2),
            4..=7 => between(3, 6),
            _ => between(7, 14),
        };
        let sick = entropy.below(shape.datanodes);
        let mut draw = Draw { entropy, shape, sick };
        let mut faults: Vec<Fault> = (0..if with_faults { count } else { 0 }).map(|_| draw.fault()).collect();
        // From a source of its own: what the seeds of the other half do has stayed what it was.
        draw.entropy = Entropy::seeded(seed ^ SECOND_SOURCE);
        if with_faults && draw.below(2) == 0 {
            let rots = faults.iter().any(|fault| matches!(fault.kind, Kind::Flip { .. }));
            // Of a file with a damaged replica that nobody has noticed yet, that one may be the one that is kept.
            draw.shape.least_replicas = if rots { 2 } else { 1 };
            draw.shape.report_range = [1, 3, 4_096][draw.below(3) as usize];
            faults.extend(draw.story());
        }
        faults.sort_by_key(|fault| fault.at_ms);
        Self { shape: draw.shape, faults }
    }
}

impl Draw {
    fn below(&self, bound: u64) -> u64 {
        self.entropy.below(bound)
    }

    fn datanode(&self) -> Host {
        Host::Datanode(self.below(self.shape.datanodes))
    }

    /// One that stores something; the namenode as often as two datanodes.
    fn server(&self) -> Host {
        match self.below(self.shape.datanodes + 2) {
            0 | 1 => Host::Namenode,
            number => Host::Datanode(number - 2),
        }
    }

    fn host(&self) -> Host {
        match self.below(4) {
            0 => Host::Client(self.below(self.shape.clients)),
            _ => self.server(),
        }
    }

    fn pair(&self) -> (Host, Host) {
        loop {
            let (a, b) = (self.host(), self.host());
            let clients = matches!((a, b), (Host::Client(_), Host::Client(_)));
            if a != b && !clients {
                return (a, b);
            }
        }
    }

    fn fault(&mut self) -> Fault {
        let at_ms = QUIET_MS + self.below(self.shape.safety_ms - QUIET_MS);
        // Shorter than a heartbeat, than the stale interval, than the dead one, and longer.
        let for_ms = match self.below(4) {
            0 => 50 + self.below(450),
            1 => 500 + self.below(1_500),
            2 => 2_000 + self.below(4_000),
            _ => 6_000 + self.below(6_000),
        };
        Fault { at_ms, for_ms, kind: self.kind() }
    }

    fn kind(&mut self) -> Kind {
        match self.below(20) {
            0 => {
                let (a, b) = self.pair();
                Kind::Cut { a, b }
            }
            1 => {
                let (from, to) = self.pair();
                Kind::CutOneWay { from, to }
            }
            2 => Kind::Isolate { host: self.host() },
            3 => {
                let (a, b) = self.pair();
                Kind::Hold { a, b }
            }
            4 | 5 => Kind::Freeze { host: self.host() },
            6 => Kind::Slow { host: self.host(), latency_ms: 50 + self.below(1_000) },
            7 | 8 => Kind::Kill { host: self.host() },
            9 | 10 => Kind::PowerCut { host: self.server() },
            11 => Kind::PowerCutAll,
            12 | 13 => Kind::CutAtSync { host: self.server(), nth: 1 + self.below(12) },
            14 => Kind::AllCutAtSync { host: self.server(), nth: 1 + self.below(12) },
            15 => Kind::Restart { host: self.server() },
            16 => self.disk(),
            17 => Kind::DiskFull { host: self.datanode() },
            18 => Kind::Flip { host: self.datanode(), bytes: 1 + self.below(3) },
            _ => {
                let by_ms = [-3_600_000, -5_000, 5_000, 86_400_000][self.below(4) as usize];
                Kind::WallJump { host: self.host(), by_ms }
            }
        }
    }

    /// Faults that mean little alone and much together.
    fn story(&self) -> Vec<Fault> {
        let at_ms = QUIET_MS + self.below(self.shape.safety_ms - QUIET_MS);
        match self.below(5) {
            0 => self.slow_then_dead(Host::Namenode, at_ms),
            1 => self.slow_then_dead(Host::Datanode(self.sick), at_ms),
            2 | 3 => self.late_log_then_dead(at_ms),
            _ => self.bad_line(at_ms),
        }
    }

    /// A machine that does everything late loses power: what it has said, and what it has made durable, are as far apart as can be.
    fn slow_then_dead(&self, host: Host, at_ms: u64) -> Vec<Fault> {
        let busy = Kind::Busy { host, jitter_ms: 50 + self.below(350) };
        let cut = match self.below(3) {
            0 => Kind::PowerCut { host },
            1 => Kind::AllCutAtSync { host, nth: 1 + self.below(6) },
            _ => Kind::CutAtSync { host, nth: 1 + self.below(6) },
        };
        let cut_ms = at_ms + 200 + self.below(2_000);
        let fault = |at_ms, for_ms, kind| Fault { at_ms, for_ms, kind };
        vec![fault(at_ms, 2_000 + self.below(3_000), busy), fault(cut_ms, 200 + self.below(3_000), cut)]
    }

    /// Edits wait for their sync for longer than datanodes between two heartbeats, and then the power goes: whatever was said because of them
    /// was said too early.
    fn late_log_then_dead(&self, at_ms: u64) -> Vec<Fault> {
        let host = Host::Namenode;
        let late = Fault { at_ms, for_ms: 6_000, kind: Kind::LateLog { jitter_ms: 1_500 + self.below(2_500) } };
        let cut = Kind::CutAtSync { host, nth: 1 + self.below(3) };
        vec![late, Fault { at_ms: at_ms + 200 + self.below(1_500), for_ms: 200 + self.below(3_000), kind: cut }]
    }

    /// A datanode loses its connection to the namenode again and again, and goes on writing meanwhile.
    fn bad_line(&self, at_ms: u64) -> Vec<Fault> {
        let (a, mut at_ms) = (self.datanode(), at_ms);
        let cuts = 2 + self.below(4);
        let cut = |_| {
            at_ms += 500 + self.below(1_500);
            Fault { at_ms, for_ms: 100 + self.below(600), kind: Kind::Cut { a, b: Host::Namenode } }
        };
        (0..cuts).map(cut).collect()
    }

    fn disk(&mut self) -> Kind {
        let op = [DiskOp::Read, DiskOp::Write, DiskOp::Sync, DiskOp::Name][self.below(4) as usize];
        let host = match self.below(4) {
            0 => Host::Namenode,
            _ => Host::Datanode(self.sick),
        };
        Kind::DiskError { host, op, after: self.below(5), times: 1 + self.below(3) }
    }
}
