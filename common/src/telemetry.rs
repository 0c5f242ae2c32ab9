//! Logs: `tracing` to standard error, one line per event that an operator acts on.

use tracing_subscriber::EnvFilter;

/// Starts logging; `CAIRN_LOG` (the syntax of `RUST_LOG`) overrides `default_filter`. A second call changes nothing.
pub fn init(default_filter: &str) {
    let filter = std::env::var("CAIRN_LOG")
        .ok()
        .and_then(|text| EnvFilter::try_new(text).ok())
        .unwrap_or_else(|| EnvFilter::new(default_filter));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(true);
    // Fails only if logging was started before, as several tests in one process do.
    let _ = builder.with_ansi(false).try_init();
}
