//! Moments as people write them: RFC 3339, or milliseconds since 1970.

const DAY_MS: u64 = 86_400_000;

/// Days since 1970-01-01 of a date (proleptic Gregorian), by counting years from March, when leap days come last.
fn days_of(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// A moment in UTC with milliseconds: `2026-11-22T21:04:12.345Z`.
pub fn rfc3339(wall_ms: u64) -> String {
    let (days, of_day) = ((wall_ms / DAY_MS) as i64, wall_ms % DAY_MS);
    let shifted = days + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3_600_000, of_day / 60_000 % 60, of_day / 1_000 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", of_day % 1_000)
}

/// Reads `2026-11-22T21:04:12Z`, with a fraction or an offset (`+02:00`) if wanted, or milliseconds since 1970.
pub fn parse_time(text: &str) -> Result<u64, String> {
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse().map_err(|_| format!("{text:?} is no time: the number is too large"));
    }
    parse_rfc3339(text).ok_or_else(|| {
        format!("{text:?} is no time: write it like 2026-11-22T21:04:12Z, 2026-11-22T23:04:12.5+02:00, or milliseconds since 1970")
    })
}

fn parse_rfc3339(text: &str) -> Option<u64> {
    let number = |from: usize, to: usize| -> Option<i64> {
        let part = text.get(from..to).filter(|part| part.bytes().all(|byte| byte.is_ascii_digit()))?;
        part.parse().ok()
    };
    let mark = |at: usize, allowed: &str| text.get(at..at + 1).filter(|mark| allowed.contains(*mark)).map(|_| ());
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    for (at, allowed) in [(4, "-"), (7, "-"), (10, "Tt "), (13, ":"), (16, ":")] {
        mark(at, allowed)?;
    }
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let month_days = [31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let last_day = *month_days.get(usize::try_from(month - 1).ok()?)?;
    if !(1..=last_day).contains(&day) || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let mut rest = text.get(19..)?;
    let mut millis = 0;
    if let Some(fraction) = rest.strip_prefix('.') {
        let digits = fraction.bytes().take_while(u8::is_ascii_digit).count();
        let padded = format!("{}000", &fraction[..digits]);
        millis = padded.get(..3).filter(|_| digits > 0)?.parse().ok()?;
        rest = &fraction[digits..];
    }
    let offset_minutes = match rest {
        "Z" | "z" => 0,
        _ if rest.len() == 6 && rest.is_ascii() => {
            let (hours, minutes): (i64, i64) = (rest.get(1..3)?.parse().ok()?, rest.get(4..6)?.parse().ok()?);
            let sign = match (&rest[..1], &rest[3..4]) {
                ("+", ":") => 1,
                ("-", ":") => -1,
                _ => return None,
            };
            (hours < 24 && minutes < 60).then_some(sign * (hours * 60 + minutes))?
        }
        _ => return None,
    };
    let seconds = ((days_of(year, month, day) * 24 + hour) * 60 + minute - offset_minutes) * 60 + second;
    u64::try_from(seconds * 1_000 + millis).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_700_000_000_123, "2023-11-14T22:13:20.123Z"),
            (4_107_542_399_999, "2100-02-28T23:59:59.999Z"),
        ] {
            assert_eq!(rfc3339(ms), text);
            assert_eq!(parse_time(text), Ok(ms));
        }
        assert_eq!(parse_time("1700000000123"), Ok(1_700_000_000_123));
        assert_eq!(parse_time("2023-11-15T00:13:20.123456+02:00"), Ok(1_700_000_000_123));
        assert_eq!(parse_time("2023-11-14 17:13:20-05:00"), Ok(1_700_000_000_000));
    }

    #[test]
    fn each_day_of_centuries_reads_back() {
        for day in 0..80_000 {
            let ms = day * DAY_MS + 1;
            assert_eq!(parse_time(&rfc3339(ms)), Ok(ms));
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "yesterday",
            "2026-13-01T00:00:00Z",
            "2026-02-29T00:00:00Z",
            "2026-01-01T24:00:00Z",
            "2026-01-01",
            "2026-01-01T00:00:00",
            "2026-01-01T00:00:00.Z",
            "2026-01-01T00:00:00+2:00",
            "1969-12-31T23:59:59Z",
            "+1",
            "99999999999999999999999",
            "2026-01-01T00:00:00\u{e9}\u{e9}\u{e9}",
        ] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }
}
