//! Times as people type and read them.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

/// `90s`, `30m`, `1h30m`, `2d`, `1w`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("\"{text}\" is not a time span: write 30s, 15m, 1h, 1h30m or 2d");
    let mut rest = text;
    let mut seconds: u64 = 0;
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        let mut tail = rest[digits..].chars();
        let unit = match tail.next() {
            Some('s') => 1,
            Some('m') => 60,
            Some('h') => 3600,
            Some('d') => 86_400,
            Some('w') => 7 * 86_400,
            Some(_) | None => return Err(wrong()),
        };
        seconds = number.checked_mul(unit).and_then(|more| seconds.checked_add(more)).ok_or_else(wrong)?;
        rest = tail.as_str();
    }
    // A hundred years: beyond it the arithmetic of calendars has limits, and nobody means it.
    if seconds == 0 || seconds > 100 * 366 * 86_400 { Err(wrong()) } else { Ok(Duration::from_secs(seconds)) }
}

/// A span before now, or a time (RFC 3339).
pub(crate) fn since(text: &str) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    let span = duration(text).map_err(|_| format!("\"{text}\" is neither a time span (10m, 2h, 1d) nor a time (2026-11-20T09:00:00Z)"))?;
    let span = SignedDuration::try_from(span).map_err(|e| e.to_string())?;
    Timestamp::now().checked_sub(span).map_err(|e| e.to_string())
}

/// `3m ago`, `in 40m`; the two largest units that matter.
pub(crate) fn ago(time: Timestamp, now: Timestamp) -> String {
    let seconds = now.duration_since(time).as_secs();
    match seconds {
        0..=1 => "now".to_owned(),
        2.. => format!("{} ago", span(seconds.unsigned_abs())),
        _ => format!("in {}", span(seconds.unsigned_abs())),
    }
}

/// `40s`, `5m`, `3h20m`, `12d`.
pub(crate) fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..36_000 if seconds % 3600 >= 60 => format!("{}h{}m", seconds / 3600, seconds % 3600 / 60),
        3600..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// A time to the second, for lists where the exact moment counts.
pub(crate) fn moment(time: Timestamp) -> String {
    Timestamp::from_second(time.as_second()).unwrap_or(time).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_is_read_in_its_units() {
        for (text, seconds) in [("30s", 30), ("15m", 900), ("1h30m", 5400), ("2d", 172_800), ("1w", 604_800)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_span_is_refused() {
        for text in ["", "1", "h", "0s", "-1h", "1y", "99999999999999999999d", "200000d", "1h ", "1.5h"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_time_is_told_from_now() {
        let now = Timestamp::from_second(1_000_000).unwrap();
        let at = |s| ago(Timestamp::from_second(s).unwrap(), now);
        assert_eq!(at(1_000_000), "now");
        assert_eq!(at(999_960), "40s ago");
        assert_eq!(at(988_000), "3h20m ago");
        assert_eq!(at(1_002_400), "in 40m");
        assert_eq!(at(0), "11d ago");
    }
}
