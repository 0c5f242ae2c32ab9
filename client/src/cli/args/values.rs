//! Checks of single values: what is wrong with one needs nothing but its text.

use cairn_proto::{BLOCK_SIZE_UNIT, MAX_BLOCK_SIZE, MAX_REPLICATION, path};

use super::files::Owner;
use crate::units::{human_millis, parse_millis, parse_size};

/// A path in the cluster; it may hold a glob.
pub fn cluster_path(text: &str) -> Result<String, String> {
    path::normalize(text).map_err(|error| error.to_string())
}

/// A path in the cluster, taken as it is.
pub fn plain_path(text: &str) -> Result<String, String> {
    cluster_path(text)
}

/// `HOST:PORT`.
pub fn address(text: &str) -> Result<String, String> {
    let (host, port) = text.rsplit_once(':').ok_or_else(|| format!("{text:?} is no address: write it as HOST:PORT"))?;
    if host.is_empty() || host.contains(['/', ' ']) || port.parse::<u16>().is_err() {
        return Err(format!("{text:?} is no address: write it as HOST:PORT"));
    }
    Ok(text.to_owned())
}

/// A user or group name.
pub fn user(text: &str) -> Result<String, String> {
    let plain = |c: char| !c.is_control() && !c.is_whitespace() && !matches!(c, '/' | ':');
    if text.is_empty() || text.len() > 255 || !text.chars().all(plain) {
        return Err(format!("{text:?} is no user name"));
    }
    Ok(text.to_owned())
}

/// `OWNER`, `OWNER:GROUP`, `:GROUP`.
pub fn owner(text: &str) -> Result<Owner, String> {
    let (name, group) = text.split_once(':').unwrap_or((text, ""));
    if name.is_empty() && group.is_empty() {
        return Err(format!("{text:?} names neither owner nor group"));
    }
    for part in [name, group] {
        if !part.is_empty() {
            user(part)?;
        }
    }
    Ok(Owner { user: name.to_owned(), group: group.to_owned() })
}

/// `/rack1`, `/dc1/rack2`.
pub fn rack(text: &str) -> Result<String, String> {
    match path::normalize(text) {
        Ok(rack) if rack != "/" => Ok(rack),
        _ => Err(format!("{text:?} is no rack: write it like /rack1")),
    }
}

/// The id of a job.
pub fn job_id(text: &str) -> Result<String, String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if (1..=64).contains(&text.len()) && text.bytes().all(plain) {
        return Ok(text.to_owned());
    }
    Err(format!("{text:?} is no id of a job; `cairn job ls` lists them"))
}

/// `m3`, `r0.1`, `driver`.
pub fn log_name(text: &str) -> Result<String, String> {
    let number = |text: &str| text.parse::<u32>().is_ok();
    let task = text.strip_prefix(['m', 'r']).is_some_and(|rest| match rest.split_once('.') {
        Some((index, attempt)) => number(index) && number(attempt),
        None => number(rest),
    });
    if task || text == "driver" {
        return Ok(text.to_owned());
    }
    Err(format!("{text:?} is no task: write m3 for map 3, m3.0 for its attempt 0, r0 for reduce 0, or driver"))
}

/// `low`, `normal`, `high`, or a number.
pub fn priority(text: &str) -> Result<u32, String> {
    match text {
        "low" => Ok(25),
        "normal" => Ok(100),
        "high" => Ok(400),
        _ => match text.parse() {
            Ok(number @ 1..=1_000) => Ok(number),
            _ => Err(format!("{text:?} is no priority: low, normal, high, or 1 to 1000")),
        },
    }
}

/// Cores, as thousandths.
pub fn thousandths(text: &str) -> Result<u32, String> {
    match text.parse::<f64>() {
        Ok(cores) if (0.01..=1_024.0).contains(&cores) => Ok((cores * 1e3).round() as u32),
        _ => Err(format!("{text:?} is no number of cores: 0.01 to 1024")),
    }
}

/// A part of a whole, 0 to 1, as thousandths.
pub fn part(text: &str) -> Result<u32, String> {
    match text.parse::<f64>() {
        Ok(part) if (0.0..=1.0).contains(&part) => Ok((part * 1e3).round() as u32),
        _ => Err(format!("{text:?} is no part: 0 to 1")),
    }
}

/// 1 to 512.
pub fn replication(text: &str) -> Result<u32, String> {
    match text.parse::<u32>() {
        Ok(number) if (1..=MAX_REPLICATION).contains(&number) => Ok(number),
        _ => Err(format!("replication {text} is outside 1 to {MAX_REPLICATION}")),
    }
}

/// A multiple of 512 that a namenode could accept.
pub fn block_size(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    if bytes == 0 || bytes % BLOCK_SIZE_UNIT != 0 {
        return Err(format!("block size {bytes} is no multiple of {BLOCK_SIZE_UNIT}"));
    }
    if bytes > MAX_BLOCK_SIZE {
        return Err(format!("block size {bytes} is more than {MAX_BLOCK_SIZE} (16g)"));
    }
    Ok(bytes)
}

/// `KEY=VALUE`.
pub fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => Ok((key.trim().to_owned(), value.trim().to_owned())),
        _ => Err(format!("{text:?} is no setting: write it as KEY=VALUE")),
    }
}

/// A time between two others.
fn time(text: &str, low: u64, high: u64) -> Result<u64, String> {
    let millis = parse_millis(text)?;
    if (low..=high).contains(&millis) {
        Ok(millis)
    } else {
        Err(format!("{text} is outside {} to {}", human_millis(low), human_millis(high)))
    }
}

/// How long `chaos` goes on.
pub fn chaos_length(text: &str) -> Result<u64, String> {
    time(text, 1_000, 7 * 24 * 3_600_000)
}

/// Time between two of its faults.
pub fn chaos_interval(text: &str) -> Result<u64, String> {
    time(text, 100, 3_600_000)
}

/// Longest absence of a member.
pub fn chaos_away(text: &str) -> Result<u64, String> {
    time(text, 1_000, 600_000)
}
