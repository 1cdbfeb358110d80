//! The clock of PCs.
//!
//! The layout is `vmstate_rtc` of QEMU's hw/rtc/mc146818rtc.c, version 3: the same from
//! 1.3 on, and in all versions that were tried (7.2, 10.0).

use super::section;

/// The section's name with its length, instance and version, as they follow its number.
const NAME: &[u8] = b"\x0bmc146818rtc\0\0\0\0\0\0\0\x03";

/// Bytes of the section's body, and its fields that are times of the host's clock, in
/// nanoseconds: `periodic_timer`, `next_periodic_time`, `last_update`, `update_timer`,
/// `next_alarm_time`.
const BODY: usize = 245;
const TIMES: [usize; 5] = [157, 165, 213, 229, 237];
const LAST_UPDATE: usize = 213;

/// Changes the clock to go on from `since` nanoseconds ago; whether there is such a clock.
pub(super) fn keep(devices: &mut [u8], since: u64) -> bool {
    let Some(start) = section::body(devices, NAME, BODY) else { return false };
    let body = &mut devices[start..start + BODY];
    // A clock of the guest's time (`-rtc clock=vm`) counts from the start of QEMU, and goes
    // on from the moment by itself: it is far below any time since 1970.
    const YEARS_OF_UPTIME: u64 = 20 * 365 * 24 * 3600 * 1_000_000_000;
    if time(body, LAST_UPDATE) < YEARS_OF_UPTIME {
        return true;
    }
    for at in TIMES {
        let then = time(body, at);
        // 0 and -1 stand for a timer that is not set.
        if then >= YEARS_OF_UPTIME && then != u64::MAX {
            body[at..at + 8].copy_from_slice(&then.saturating_add(since).to_be_bytes());
        }
    }
    true
}

fn time(body: &[u8], at: usize) -> u64 {
    body[at..at + 8].iter().fold(0, |time, byte| time << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_700_000_000_000_000_000;

    fn devices(last_update: u64, end: &[u8]) -> Vec<u8> {
        let mut body = vec![0; BODY];
        body[LAST_UPDATE..LAST_UPDATE + 8].copy_from_slice(&last_update.to_be_bytes());
        body[157..165].fill(0xff);
        [b"before\x04\0\0\0\x09", NAME, &body, end, b"after"].concat()
    }

    fn last_update(devices: &[u8]) -> u64 {
        let start = section::body(devices, NAME, BODY).unwrap();
        time(&devices[start..], LAST_UPDATE)
    }

    #[test]
    fn times_of_the_host_move_and_others_stay() {
        let mut state = devices(NOW, b"\x7e\0\0\0\x09");
        let before = state.clone();
        assert!(keep(&mut state, 5));
        assert_eq!(last_update(&state), NOW + 5);
        let changed: Vec<_> = (0..state.len()).filter(|&at| state[at] != before[at]).collect();
        assert_eq!(changed.len(), 1);
        let mut virtual_clock = devices(1_000_000_000, b"\x05");
        let before = virtual_clock.clone();
        assert!(keep(&mut virtual_clock, 5));
        assert_eq!(virtual_clock, before);
    }

    #[test]
    fn what_is_not_the_clock_is_left_alone() {
        for mut state in [
            devices(NOW, b"\x7e\0\0\0\x08"),
            devices(NOW, b"\0\0\0\0\0"),
            devices(NOW, b"")[..200].to_vec(),
            NAME.to_vec(),
            Vec::new(),
        ] {
            let before = state.clone();
            assert!(!keep(&mut state, 5));
            assert_eq!(state, before);
        }
    }
}
