//! Moments, as they stand in keys and as people write them. All are in UTC.

const DAY: i64 = 24 * 60 * 60;

/// Reads a time: a day, a minute or a second, with `T` or `_` between day and time, in UTC. Returns
/// from when to when it goes.
pub fn read_time(text: &str) -> Option<(i64, i64)> {
    let text = text.strip_suffix('Z').unwrap_or(text);
    let (day, time) = match text.split_once(['T', '_', ' ']) {
        Some((day, time)) => (day, Some(time)),
        None => (text, None),
    };
    let number = |text: &str, len: usize| {
        (text.len() == len && text.bytes().all(|b| b.is_ascii_digit()))
            .then(|| text.parse::<i64>().ok())?
    };
    let mut parts = day.split('-');
    let (year, month) = (number(parts.next()?, 4)?, number(parts.next()?, 2)?);
    let day = parts.next().map(|day| number(day, 2)).unwrap_or(None);
    if parts.next().is_some() {
        return None;
    }
    let Some(day) = day else {
        // A whole month.
        let is_month = text.len() == 7 && (1..=12).contains(&month);
        let next = if month == 12 { (year + 1, 1) } else { (year, month + 1) };
        return is_month.then(|| (days(year, month, 1) * DAY, days(next.0, next.1, 1) * DAY));
    };
    let midnight = days(year, month, day) * DAY;
    if civil(days(year, month, day)) != (year, month, day) {
        return None;
    }
    let Some(time) = time else { return Some((midnight, midnight + DAY)) };
    let fields: Vec<i64> = time.split(':').map(|part| number(part, 2)).collect::<Option<_>>()?;
    let (seconds, len) = match fields[..] {
        [hour] => (hour * 3600, 3600),
        [hour, minute] if minute < 60 => (hour * 3600 + minute * 60, 60),
        [hour, minute, second] if minute < 60 && second < 60 => {
            (hour * 3600 + minute * 60 + second, 1)
        }
        _ => return None,
    };
    (seconds < DAY).then(|| (midnight + seconds, midnight + seconds + len))
}

/// Days since 1970 of a date (Howard Hinnant's `days_from_civil`).
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year - era * 400;
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// The date of a day since 1970.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year + era * 400 + i64::from(month <= 2), month, day)
}

/// Year, month, day, hour, minute and second, in UTC.
pub fn calendar(seconds: i64) -> [i64; 6] {
    let (year, month, day) = civil(seconds.div_euclid(DAY));
    let time = seconds.rem_euclid(DAY);
    [year, month, day, time / 3600, time / 60 % 60, time % 60]
}

/// A time as people read it, in UTC.
pub fn readable(seconds: i64) -> String {
    let [year, month, day, hour, minute, second] = calendar(seconds);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
}

/// A time in microseconds as it stands in keys: in order as text, too.
pub fn stamp(unix_us: u64) -> String {
    let (seconds, us) = ((unix_us / 1_000_000) as i64, unix_us % 1_000_000);
    let [year, month, day, hour, minute, second] = calendar(seconds);
    format!("{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}.{us:06}Z")
}

/// Reads what [`stamp`] made.
pub fn read_stamp(text: &str) -> Option<u64> {
    let digits = text.strip_suffix('Z')?;
    let (day, time) = digits.split_once('T')?;
    let (time, us) = time.split_once('.')?;
    if !digits.is_ascii() || day.len() != 8 || time.len() != 6 || us.len() != 6 {
        return None;
    }
    let text = format!(
        "{}-{}-{}T{}:{}:{}",
        &day[..4],
        &day[4..6],
        &day[6..],
        &time[..2],
        &time[2..4],
        &time[4..]
    );
    let (seconds, _) = read_time(&text)?;
    u64::try_from(seconds).ok()?.checked_mul(1_000_000)?.checked_add(us.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_written() {
        for seconds in [0, 951_782_399, 951_782_400, 1_795_651_199, 4_102_444_800] {
            let us = seconds as u64 * 1_000_000 + 42;
            assert_eq!(read_stamp(&stamp(us)), Some(us));
            assert_eq!(read_time(&readable(seconds)), Some((seconds, seconds + 1)));
        }
        assert_eq!(readable(951_868_799), "2000-02-29T23:59:59");
        let len = |text| read_time(text).map(|(from, to)| to - from);
        assert_eq!(len("2026-02"), Some(28 * DAY));
        assert_eq!(len("2026-11-25T10"), Some(3600));
        assert_eq!(len("2026-11-25_10:30"), Some(60));
        for wrong in ["2026-13", "2026-02-29", "2026-11-25T24", "2026-11-25T10:60", "2026", "1"] {
            assert_eq!(read_time(wrong), None, "{wrong}");
        }
    }
}
