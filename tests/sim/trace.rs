//! What happened, line by line with virtual time, and the digest over it: the fingerprint of a seed. Violations are kept here too.

use std::cell::RefCell;
use std::fmt::Display;

/// An invariant that did not hold.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which: the name of its file in `invariants/`.
    pub invariant: &'static str,
    /// What was seen.
    pub text: String,
}

#[derive(Default)]
struct Trace {
    digest: u64,
    echo: bool,
    outside_ms: u64,
    violations: Vec<Violation>,
}

thread_local! {
    static TRACE: RefCell<Trace> = RefCell::default();
}

/// FNV-1a, continued from `digest`.
pub fn digest(mut digest: u64, bytes: &[u8]) -> u64 {
    if digest == 0 {
        digest = 0xcbf2_9ce4_8422_2325;
    }
    for byte in bytes {
        digest = (digest ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    }
    digest
}

/// Starts anew; `echo` prints every line to stderr.
pub fn begin(echo: bool) {
    TRACE.with_borrow_mut(|trace| *trace = Trace { echo, ..Trace::default() });
}

/// Between two steps of the simulation no host runs that could tell the time.
pub fn set_time(ms: u64) {
    TRACE.with_borrow_mut(|trace| trace.outside_ms = ms);
}

/// Virtual milliseconds since the start.
pub fn now_ms() -> u64 {
    match turmoil::in_simulation() {
        true => turmoil::sim_elapsed().map_or(0, |elapsed| elapsed.as_millis() as u64),
        false => TRACE.with_borrow(|trace| trace.outside_ms),
    }
}

/// Adds a line.
pub fn note(who: &str, text: impl Display) {
    let line = format!("{:>7} {who:<9} {text}", now_ms());
    TRACE.with_borrow_mut(|trace| {
        trace.digest = digest(trace.digest, line.as_bytes());
        if trace.echo {
            eprintln!("{line}");
        }
    });
}

/// Adds bytes to the fingerprint without a line.
pub fn fold(bytes: &[u8]) {
    TRACE.with_borrow_mut(|trace| trace.digest = digest(trace.digest, bytes));
}

/// An invariant does not hold.
pub fn violated(invariant: &'static str, text: impl Display) {
    let text = text.to_string();
    note("VIOLATION", format!("{invariant}: {text}"));
    TRACE.with_borrow_mut(|trace| trace.violations.push(Violation { invariant, text }));
}

/// Does everything hold so far?
pub fn all_well() -> bool {
    TRACE.with_borrow(|trace| trace.violations.is_empty())
}

/// The digest over all lines, and the violations.
pub fn end() -> (u64, Vec<Violation>) {
    TRACE.with_borrow_mut(|trace| (trace.digest, std::mem::take(&mut trace.violations)))
}

thread_local! {
    static HOST: RefCell<String> = const { RefCell::new(String::new()) };
}

struct Text(String);

impl tracing::field::Visit for Text {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        use std::fmt::Write as _;
        // Writing to a string cannot fail.
        let _ = match field.name() {
            "message" => write!(self.0, " {value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }

    fn record_str(&mut self, field: &tracing::field::Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

/// Lines of the daemons' own log, for `--trace`. It keeps no state: what it costs must not change what happens.
pub struct Echo;

impl tracing::Subscriber for Echo {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        // The simulator's span names the host that runs.
        let host = metadata.is_span() && metadata.name() == "node";
        let ours = metadata.is_event() && metadata.target().starts_with("cairn");
        host || ours && *metadata.level() <= tracing::Level::DEBUG
    }

    fn new_span(&self, attributes: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        let mut name = Text(String::new());
        attributes.record(&mut name);
        HOST.set(name.0.trim_start_matches(" name=").to_owned());
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        let who = HOST.with_borrow(Clone::clone);
        let (level, target) = (event.metadata().level(), event.metadata().target());
        eprintln!("{:>7} {who:<9}   {level} {target}{}", now_ms(), text.0);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {
        HOST.set(String::new());
    }
}
