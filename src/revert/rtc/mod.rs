//! The machine's battery-backed clock. A guest that is brought back finds its own clock
//! where it was at the moment, but this one goes with the host's: QEMU keeps what it
//! shows as a difference to the host's time, and so it shows the time of now. To have it
//! go on from the moment as well, that difference is changed in the saved device state.
//!
//! Each machine has another clock; those that are known have a file each.

mod mc146818;
mod pl031;
mod section;

/// What the clock shows after a revert.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Rtc {
    /// The time of now, as if it had run on meanwhile: what QEMU does by itself.
    #[default]
    Now,
    /// The time of the moment, from which it goes on.
    Keep,
}

/// Changes saved device state so that the clock goes on from the moment, `since`
/// nanoseconds of the host's clock ago. Says why where that can't be done; nothing has
/// been changed then.
pub(super) fn keep(devices: &mut [u8], since: u64) -> Result<(), &'static str> {
    match mc146818::keep(devices, since) || pl031::keep(devices, since) {
        true => Ok(()),
        false => Err("this machine has no clock of a kind that is known (mc146818rtc of PCs, \
                      pl031 of ARM's `virt`)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_known_clock_is_refused() {
        for mut state in [b"".to_vec(), b"\x04\0\0\0\x09\x05timer\0\0\0\0\0\0\0\x02".to_vec()] {
            let before = state.clone();
            assert!(keep(&mut state, 5).unwrap_err().contains("pl031"));
            assert_eq!(state, before);
        }
    }
}
