//! The clock of ARM's machines.
//!
//! The layout is `vmstate_pl031` of QEMU's hw/rtc/pl031.c, version 1, with the subsection
//! `pl031/tick-offset` of 4.1 and later: the same in all versions that were tried (7.2,
//! 10.0).

use super::section;
use crate::wire::section::SUBSECTION;

/// The section's name with its length, instance and version, as they follow its number.
const NAME: &[u8] = b"\x05pl031\0\0\0\0\0\0\0\x01";

/// Bytes of the section's body. Its first word is what has to be added to the guest's time
/// since its start to have what the clock shows, in seconds.
const BODY: usize = 24;

/// The subsection's name with its length and version. Its one word is what has to be added
/// to the time of the clock that `-rtc clock=` names, to have what this one shows, in seconds.
const TICK_OFFSET: &[u8] = b"\x11pl031/tick-offset\0\0\0\x01";

/// Changes the clock to go on from `since` nanoseconds ago; whether there is such a clock.
pub(super) fn keep(devices: &mut [u8], since: u64) -> bool {
    let Some(start) = section::body(devices, NAME, BODY) else { return false };
    let end = start + BODY;
    let subsection = [&[SUBSECTION], TICK_OFFSET].concat();
    // Machine types before `virt-4.1` have no such subsection: there QEMU sets the clock by
    // the guest's time, which goes on from the moment.
    if !devices[end..].starts_with(&subsection) {
        return true;
    }
    let word = end + subsection.len();
    let Some(offset) = read(devices, word) else { return false };
    // By a clock of the guest's time (`-rtc clock=vm`), both are the same, and by one of the
    // host's uptime (`clock=rt`) not far apart; by the host's time, it is as far from one to
    // the other as from 1970 to the guest's start.
    const YEARS_OF_UPTIME: u32 = 20 * 365 * 24 * 3600;
    let apart = read(devices, start).map_or(0, |own| own.wrapping_sub(offset));
    if (YEARS_OF_UPTIME..u32::MAX - YEARS_OF_UPTIME).contains(&apart) {
        // The clock has 32 bits, and goes round.
        let kept = offset.wrapping_sub((since / 1_000_000_000) as u32);
        devices[word..word + 4].copy_from_slice(&kept.to_be_bytes());
    }
    true
}

fn read(devices: &[u8], at: usize) -> Option<u32> {
    devices.get(at..at + 4)?.try_into().ok().map(u32::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u32 = 1_700_000_000;

    /// Device state with a clock of these two offsets.
    fn devices(own: u32, offset: u32) -> Vec<u8> {
        let mut body = vec![0; BODY];
        body[..4].copy_from_slice(&own.to_be_bytes());
        let head = [b"before\x04\0\0\0\x09", NAME, &body, b"\x05", TICK_OFFSET].concat();
        [&head, &offset.to_be_bytes()[..], b"\x7e\0\0\0\x09after"].concat()
    }

    #[test]
    fn a_clock_of_the_hosts_time_is_set_back() {
        let mut state = devices(NOW - 100, 0);
        assert!(keep(&mut state, 5_900_000_000));
        assert_eq!(state, devices(NOW - 100, 0u32.wrapping_sub(5)));
    }

    #[test]
    fn a_clock_of_the_guests_time_stays() {
        let mut state = devices(NOW, NOW);
        assert!(keep(&mut state, 5_000_000_000));
        assert_eq!(state, devices(NOW, NOW));
        let mut state = devices(99, 100);
        assert!(keep(&mut state, 5_000_000_000));
        assert_eq!(state, devices(99, 100));
        // As an old machine type has it.
        let old = [b"before\x04\0\0\0\x09", NAME, &[7; BODY], b"\x7e\0\0\0\x09"].concat();
        let mut state = old.clone();
        assert!(keep(&mut state, 5_000_000_000));
        assert_eq!(state, old);
    }

    #[test]
    fn state_that_ends_early_is_left_alone() {
        let whole = devices(NOW - 100, 0);
        for len in 0..whole.len() - 10 {
            let mut state = whole[..len].to_vec();
            assert!(!keep(&mut state, 5) || state == whole[..len]);
        }
    }
}
