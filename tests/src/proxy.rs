//! A TCP proxy that breaks what passes through it. Needs no rights: it is a process of the user between two others.
//!
//! Each [`Proxy`] listens on one address and dials one other. What it does to traffic is data ([`Rules`]), changed at any time, also for open
//! connections; everything that it did is counted ([`Proxy::seen`]), so that a test can show that its fault fired.
//!
//! "Up" is from who dialled to who is dialled.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Read at once.
const BUFFER: usize = 64 << 10;
/// A read of so much holds frames of a block in its middle, not the messages around them.
const BULK: usize = 16 << 10;

/// What happens to bytes of one direction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flow {
    /// They pass.
    Pass,
    /// They wait, as in a network that drops every packet: the sender sees a peer that takes nothing. They arrive if it heals in time.
    Hold,
    /// They arrive later by this.
    Delay(Duration),
    /// So many bytes a second.
    Throttle(u64),
    /// About one bit in so many bytes is flipped; only inside bulk data (frames of blocks), where a checksum must catch it.
    Flip(u64),
}

/// What happens to new connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Accept {
    /// They are passed on.
    Serve,
    /// Nothing listens: they are refused.
    Refuse,
    /// They are opened, and nobody is there.
    Ignore,
}

/// How open connections end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cut {
    /// With RST.
    Reset,
    /// With FIN.
    Close,
}

/// What a proxy does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rules {
    /// With new connections.
    pub accept: Accept,
    /// With bytes from who dialled.
    pub up: Flow,
    /// With bytes to who dialled.
    pub down: Flow,
}

impl Rules {
    /// A network that works.
    pub const PASS: Self = Self { accept: Accept::Serve, up: Flow::Pass, down: Flow::Pass };
    /// Nothing passes either way.
    pub const BLACKHOLE: Self = Self { accept: Accept::Ignore, up: Flow::Hold, down: Flow::Hold };
    /// Requests arrive, answers do not.
    pub const NO_ANSWERS: Self = Self { accept: Accept::Serve, up: Flow::Pass, down: Flow::Hold };
    /// Requests do not arrive.
    pub const NO_REQUESTS: Self = Self { accept: Accept::Serve, up: Flow::Hold, down: Flow::Pass };

    /// The same in both directions.
    pub fn both(flow: Flow) -> Self {
        Self { accept: Accept::Serve, up: flow, down: flow }
    }
}

/// What a proxy has done.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Seen {
    /// Connections passed on.
    pub connections: u64,
    /// Connections ended by [`Proxy::cut`].
    pub cut: u64,
    /// Connections opened for nobody.
    pub ignored: u64,
    /// Bytes from who dialled.
    pub bytes_up: u64,
    /// Bytes to who dialled.
    pub bytes_down: u64,
    /// Times that bytes came and had to wait.
    pub held: u64,
    /// Times that bytes were delayed or throttled.
    pub slowed: u64,
    /// Bits flipped.
    pub flipped: u64,
}

#[derive(Default)]
struct Counters {
    connections: AtomicU64,
    cut: AtomicU64,
    ignored: AtomicU64,
    bytes: [AtomicU64; 2],
    held: AtomicU64,
    slowed: AtomicU64,
    flipped: AtomicU64,
    /// Bulk bytes since the last flip.
    bulk: AtomicU64,
}

struct Control {
    target: String,
    rules: watch::Sender<Rules>,
    cuts: watch::Sender<Option<Cut>>,
    counters: Counters,
}

/// One proxy; ends with its connections when it is dropped.
pub struct Proxy {
    address: String,
    control: Arc<Control>,
    task: JoinHandle<()>,
}

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().thread_name("proxy").build().unwrap()
    })
}

impl Proxy {
    /// Listens on `address` ("IP:PORT"; port 0 takes a free one) and passes on to `target`.
    pub fn start(address: &str, target: &str) -> Self {
        let listener = runtime().block_on(TcpListener::bind(address)).unwrap_or_else(|e| panic!("{address}: {e}"));
        let address = listener.local_addr().unwrap().to_string();
        let control = Arc::new(Control {
            target: target.to_owned(),
            rules: watch::channel(Rules::PASS).0,
            cuts: watch::channel(None).0,
            counters: Counters::default(),
        });
        let task = runtime().spawn(accept(listener, address.clone(), Arc::clone(&control)));
        Self { address, control, task }
    }

    /// Where it listens.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// From now on this is done to all connections, open and new.
    pub fn set(&self, rules: Rules) {
        self.control.rules.send_replace(rules);
    }

    /// Everything passes again.
    pub fn heal(&self) {
        self.set(Rules::PASS);
    }

    /// Ends all open connections.
    pub fn cut(&self, how: Cut) {
        self.control.cuts.send_replace(Some(how));
    }

    /// What it has done so far.
    pub fn seen(&self) -> Seen {
        let counters = &self.control.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Seen {
            connections: get(&counters.connections),
            cut: get(&counters.cut),
            ignored: get(&counters.ignored),
            bytes_up: get(&counters.bytes[0]),
            bytes_down: get(&counters.bytes[1]),
            held: get(&counters.held),
            slowed: get(&counters.slowed),
            flipped: get(&counters.flipped),
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
        self.cut(Cut::Reset);
    }
}

async fn accept(listener: TcpListener, address: String, control: Arc<Control>) {
    let mut rules = control.rules.subscribe();
    let mut listener = Some(listener);
    let mut ignored = Vec::new();
    loop {
        let now = rules.borrow_and_update().accept;
        if now != Accept::Ignore {
            ignored.clear();
        }
        if now == Accept::Refuse {
            listener = None;
            if rules.changed().await.is_err() {
                return;
            }
            continue;
        }
        let Some(open) = &listener else {
            match TcpListener::bind(&address).await {
                Ok(bound) => listener = Some(bound),
                // An old connection may still hold the port.
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
            continue;
        };
        let connection = tokio::select! {
            biased;
            changed = rules.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
            connection = open.accept() => connection,
        };
        let Ok((connection, _)) = connection else { continue };
        if now == Accept::Ignore {
            control.counters.ignored.fetch_add(1, Ordering::Relaxed);
            ignored.push(connection);
        } else {
            tokio::spawn(serve(connection, Arc::clone(&control)));
        }
    }
}

async fn serve(mut client: TcpStream, control: Arc<Control>) {
    let mut cuts = control.cuts.subscribe();
    let Ok(mut server) = TcpStream::connect(&control.target).await else { return reset(&client) };
    control.counters.connections.fetch_add(1, Ordering::Relaxed);
    // What is sent in small pieces must not wait for more of it, here no more than without us.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let with_reset = {
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        tokio::select! {
            biased;
            cut = cuts.changed() => {
                control.counters.cut.fetch_add(1, Ordering::Relaxed);
                cut.is_err() || *cuts.borrow() == Some(Cut::Reset)
            }
            // A peer that died without a word takes the connection with it on the other side, too.
            ended = async {
                tokio::try_join!(
                    pump(from_client, to_server, 0, &control),
                    pump(from_server, to_client, 1, &control),
                )
            } => ended.is_err(),
        }
    };
    if with_reset {
        reset(&client);
        reset(&server);
    }
}

/// Makes the coming close of a socket an RST.
fn reset(socket: &TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let length = size_of::<libc::linger>() as libc::socklen_t;
    let value = (&raw const linger).cast();
    // SAFETY: the socket is open, and the pointer is to a live value of that length.
    unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, value, length) };
}

/// Moves bytes one way, as the rules say, until the sender ends or something breaks.
async fn pump(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, way: usize, control: &Control) -> std::io::Result<()> {
    let mut rules = control.rules.subscribe();
    let counters = &control.counters;
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = from.read(&mut buffer).await?;
        let mut counted = false;
        loop {
            let now = *rules.borrow_and_update();
            match if way == 0 { now.up } else { now.down } {
                Flow::Pass => break,
                Flow::Hold => {
                    if !std::mem::replace(&mut counted, true) {
                        counters.held.fetch_add(1, Ordering::Relaxed);
                    }
                    if rules.changed().await.is_err() {
                        return Ok(());
                    }
                }
                Flow::Delay(time) => {
                    counters.slowed.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(time).await;
                    break;
                }
                Flow::Throttle(rate) => {
                    counters.slowed.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_secs_f64(count as f64 / rate.max(1) as f64)).await;
                    break;
                }
                Flow::Flip(every) => {
                    flip(&mut buffer[..count], every, counters);
                    break;
                }
            }
        }
        if count == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..count]).await?;
        counters.bytes[way].fetch_add(count as u64, Ordering::Relaxed);
    }
}

fn flip(bytes: &mut [u8], every: u64, counters: &Counters) {
    if bytes.len() < BULK {
        return;
    }
    let bulk = counters.bulk.fetch_add(bytes.len() as u64, Ordering::Relaxed) + bytes.len() as u64;
    if bulk >= every {
        counters.bulk.store(0, Ordering::Relaxed);
        // The middle of so much is inside a frame or its header, each of which has a checksum.
        let at = bytes.len() / 2 + (bulk % 64) as usize;
        bytes[at] ^= 1 << (bulk % 8);
        counters.flipped.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener as Server, TcpStream as Client};
    use std::time::Instant;

    use super::*;
    use crate::wait_until;

    /// A server that sends back what comes, and a proxy before it.
    fn echo() -> Proxy {
        let server = Server::bind("127.0.0.1:0").unwrap();
        let target = server.local_addr().unwrap().to_string();
        std::thread::spawn(move || {
            for connection in server.incoming() {
                std::thread::spawn(move || {
                    let mut connection = connection.unwrap();
                    let mut copy = connection.try_clone().unwrap();
                    let _ = std::io::copy(&mut connection, &mut copy);
                    let _ = copy.shutdown(std::net::Shutdown::Write);
                });
            }
        });
        Proxy::start("127.0.0.1:0", &target)
    }

    fn dial(proxy: &Proxy) -> Client {
        let client = Client::connect(proxy.address()).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        client
    }

    fn trip(client: &mut Client, bytes: &[u8]) -> Vec<u8> {
        client.write_all(bytes).unwrap();
        let mut back = vec![0; bytes.len()];
        client.read_exact(&mut back).unwrap();
        back
    }

    #[test]
    fn passes_holds_slows_and_counts() {
        let proxy = echo();
        let mut client = dial(&proxy);
        assert_eq!(trip(&mut client, b"hello"), b"hello");
        proxy.set(Rules::NO_ANSWERS);
        client.write_all(b"held").unwrap();
        wait_until("an answer waits", Duration::from_secs(10), || proxy.seen().held == 1);
        assert_eq!(proxy.seen().bytes_up, 9);
        proxy.heal();
        let mut back = [0; 4];
        client.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"held");
        proxy.set(Rules::both(Flow::Delay(Duration::from_millis(60))));
        let started = Instant::now();
        trip(&mut client, b"later");
        assert!(started.elapsed() >= Duration::from_millis(120));
        proxy.set(Rules { up: Flow::Throttle(10_000), ..Rules::PASS });
        let started = Instant::now();
        trip(&mut client, &[7; 1_000]);
        assert!(started.elapsed() >= Duration::from_millis(90));
        assert!(proxy.seen().slowed >= 3);
        // The end of one side is the end for the other.
        client.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(client.read(&mut back).unwrap(), 0);
    }

    #[test]
    fn cuts_refuses_and_ignores() {
        let proxy = echo();
        let mut client = dial(&proxy);
        trip(&mut client, b"x");
        proxy.cut(Cut::Reset);
        let error = client.read(&mut [0; 1]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        let mut client = dial(&proxy);
        trip(&mut client, b"x");
        proxy.cut(Cut::Close);
        assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
        assert_eq!(proxy.seen().cut, 2);
        proxy.set(Rules { accept: Accept::Refuse, ..Rules::PASS });
        wait_until("it is refused", Duration::from_secs(10), || Client::connect(proxy.address()).is_err());
        proxy.set(Rules::BLACKHOLE);
        wait_until("it listens again", Duration::from_secs(10), || Client::connect(proxy.address()).is_ok());
        wait_until("nobody is there", Duration::from_secs(10), || proxy.seen().ignored > 0);
        proxy.heal();
        assert_eq!(trip(&mut dial(&proxy), b"back"), b"back");
    }

    #[test]
    fn flips_bits_in_bulk_only() {
        let proxy = echo();
        proxy.set(Rules { up: Flow::Flip(1), ..Rules::PASS });
        let mut client = dial(&proxy);
        assert_eq!(trip(&mut client, b"small is left alone"), b"small is left alone");
        let bytes = vec![0; 32 << 10];
        let flipped: u32 = trip(&mut client, &bytes).iter().map(|byte| byte.count_ones()).sum();
        assert_eq!(u64::from(flipped), proxy.seen().flipped);
        wait_until("bits were flipped", Duration::from_secs(10), || {
            trip(&mut client, &bytes);
            proxy.seen().flipped > 0
        });
    }

    #[test]
    fn a_server_that_is_gone_looks_gone() {
        let target = Server::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let proxy = Proxy::start("127.0.0.1:0", &target);
        let mut client = dial(&proxy);
        assert!(!matches!(client.read(&mut [0; 1]), Ok(1..)));
    }
}
