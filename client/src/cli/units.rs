//! Sizes, durations and times as people write and read them.

/// Bytes of "512", "64k", "128m", "1.5g", "2TiB": suffixes are powers of 1,024.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(trimmed.len());
    let (number, suffix) = trimmed.split_at(digits);
    let shift = match suffix.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(format!("{text:?} is no size: write it like 512, 64k, 128m or 1g")),
    };
    let too_large = || format!("{text:?} is larger than any size can be");
    if !number.contains('.') {
        let value: u64 = number.parse().map_err(|_| {
            let digits_only = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
            if digits_only { too_large() } else { format!("{text:?} is no size: write it like 512, 64k, 128m or 1g") }
        })?;
        return value.checked_mul(1 << shift).ok_or_else(too_large);
    }
    let value: f64 = number.parse().map_err(|_| format!("{text:?} is no size: write it like 512, 64k, 128m or 1g"))?;
    let bytes = value * (1_u64 << shift) as f64;
    if bytes >= u64::MAX as f64 { Err(too_large()) } else { Ok(bytes.round() as u64) }
}

/// Milliseconds of "500", "500ms", "30s", "5m", "24h", "7d".
pub fn parse_millis(text: &str) -> Result<u64, String> {
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
    let (number, suffix) = trimmed.split_at(digits);
    let factor = match suffix.trim() {
        "" | "ms" => 1,
        "s" => 1_000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(format!("{text:?} is no time: write it like 500ms, 30s, 5m or 24h")),
    };
    let value: u64 = number.parse().map_err(|_| format!("{text:?} is no time: write it like 500ms, 30s, 5m or 24h"))?;
    value.checked_mul(factor).ok_or_else(|| format!("{text:?} is longer than any time can be"))
}

/// "1.2 G": three significant digits at most, as `hdfs dfs -ls -h` shows sizes; below 1,024 the plain number.
pub fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["K", "M", "G", "T", "P", "E"];
    if bytes < 1_024 {
        return bytes.to_string();
    }
    let mut value = bytes as f64 / 1_024.0;
    let mut unit = 0;
    // 1023.95 would be shown as 1024.0, so it moves up before it is rounded.
    while value >= 1_023.95 && unit + 1 < UNITS.len() {
        value /= 1_024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// `human_size` or the plain number.
pub fn size(bytes: u64, human: bool) -> String {
    if human { human_size(bytes) } else { bytes.to_string() }
}

/// "0.35 s", "12.3 s", "2 min 5 s".
pub fn human_millis(millis: u64) -> String {
    match millis {
        0..10_000 => format!("{:.2} s", millis as f64 / 1e3),
        10_000..120_000 => format!("{:.1} s", millis as f64 / 1e3),
        _ => format!("{} min {} s", millis / 60_000, millis % 60_000 / 1_000),
    }
}

/// "1,234,567".
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// "1 file", "2 files".
pub fn counted(number: u64, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", grouped(number))
}

/// Local time to the minute, as `hdfs dfs -ls` shows it.
pub fn local_minute(wall_ms: u64) -> String {
    let time = local(wall_ms);
    format!("{:04}-{:02}-{:02} {:02}:{:02}", time[0], time[1], time[2], time[3], time[4])
}

/// Local time to the second.
pub fn local_second(wall_ms: u64) -> String {
    format!("{}:{:02}", local_minute(wall_ms), local(wall_ms)[5])
}

/// Year, month, day, hour, minute, second of the user's time zone.
fn local(wall_ms: u64) -> [i32; 6] {
    let seconds = (wall_ms / 1_000) as libc::time_t;
    // SAFETY: an all-zero tm is a valid value for the call to fill.
    let mut time: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live values; on failure `time` stays all zero, which prints as a date of 1900.
    unsafe { libc::localtime_r(&raw const seconds, &raw mut time) };
    [time.tm_year + 1_900, time.tm_mon + 1, time.tm_mday, time.tm_hour, time.tm_min, time.tm_sec]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_suffixes() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("64k", 64 << 10),
            ("128M", 128 << 20),
            ("1g", 1 << 30),
            ("1 GiB", 1 << 30),
            ("2tb", 2 << 40),
            ("1.5g", 3 << 29),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "k", "-1", "1x", "1..2k", "18446744073709551616", "99999999t", "0x10"] {
            let error = parse_size(text).unwrap_err();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }

    #[test]
    fn times_with_suffixes() {
        for (text, millis) in [("500", 500), ("500ms", 500), ("30s", 30_000), ("5m", 300_000), ("1d", 86_400_000)] {
            assert_eq!(parse_millis(text), Ok(millis));
        }
        assert!(parse_millis("5 years").is_err());
        assert!(parse_millis("-1s").is_err());
    }

    #[test]
    fn sizes_for_people() {
        for (bytes, text) in [
            (0, "0"),
            (1_023, "1023"),
            (1_024, "1.0 K"),
            (1_536, "1.5 K"),
            (1_048_575, "1.0 M"),
            (128 << 20, "128.0 M"),
            (u64::MAX, "16.0 E"),
        ] {
            assert_eq!(human_size(bytes), text);
        }
        assert_eq!(human_millis(350), "0.35 s");
        assert_eq!(human_millis(125_000), "2 min 5 s");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(grouped(12), "12");
        assert_eq!(counted(1, "file"), "1 file");
        assert_eq!(counted(2_000, "block"), "2,000 blocks");
    }
}
