//! Whether the guest ran when its stream was written: the device `globalstate`
//! says so, with QEMU's name of the run state in a fixed place
//! (`migration/global_state.c`).

use std::ops::Range;

use super::section::{FOOTER, FULL, MARK_BYTES};

/// How the section of `globalstate` goes on behind the section's number: its name,
/// instance 0, version 1.
const HEAD: &[u8] = b"\x0bglobalstate\0\0\0\0\0\0\0\x01";
/// Length in bytes of the state's length, which comes first.
const LENGTH_BYTES: usize = 4;
/// Room for the state's name, which ends with a zero byte.
const STATE_BYTES: usize = 100;

/// Where the state's length and name stand.
fn find(devices: &[u8]) -> Option<Range<usize>> {
    let stands_at = |head: usize| {
        let body = head + HEAD.len();
        let end = body + LENGTH_BYTES + STATE_BYTES;
        let mark = devices.get(head.checked_sub(MARK_BYTES)?..head)?;
        let footer = devices.get(end..end + MARK_BYTES)?;
        (mark[0] == FULL && footer[0] == FOOTER && mark[1..] == footer[1..]).then_some(body..end)
    };
    let heads = devices.windows(HEAD.len()).enumerate().filter(|(_, bytes)| *bytes == HEAD);
    heads.map(|(at, _)| at).find_map(stands_at)
}

/// QEMU's name of the run state, such as `running` or `paused`.
pub(crate) fn get(devices: &[u8]) -> Option<String> {
    let state = &devices[find(devices)?][LENGTH_BYTES..];
    let name = state.split(|byte| *byte == 0).next()?;
    String::from_utf8(name.to_vec()).ok()
}

/// Changes the run state to running. Returns false if there is no run state.
pub fn set_running(devices: &mut [u8]) -> bool {
    const RUNNING: &[u8] = b"running\0";
    let Some(place) = find(devices) else { return false };
    let (len, state) = devices[place].split_at_mut(LENGTH_BYTES);
    len.copy_from_slice(&(RUNNING.len() as u32).to_be_bytes());
    state.fill(0);
    state[..RUNNING.len()].copy_from_slice(RUNNING);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices(state: &[u8]) -> Vec<u8> {
        let mut bytes = b"\x04\0\0\0\x09\x05timer....\x0bglobalstate".to_vec();
        bytes.extend_from_slice(b"\x04\0\0\0\x2a");
        bytes.extend_from_slice(HEAD);
        bytes.extend_from_slice(&(state.len() as u32 + 1).to_be_bytes());
        let mut room = [0; STATE_BYTES];
        room[..state.len()].copy_from_slice(state);
        bytes.extend_from_slice(&room);
        bytes.extend_from_slice(b"\x7e\0\0\0\x2a");
        bytes
    }

    #[test]
    fn a_paused_guest_becomes_a_running_one() {
        let mut bytes = devices(b"paused");
        assert_eq!(get(&bytes).as_deref(), Some("paused"));
        assert!(set_running(&mut bytes));
        assert_eq!(bytes, devices(b"running"));
    }

    #[test]
    fn what_only_looks_like_it_is_left_alone() {
        let whole = devices(b"paused");
        for cut in 0..whole.len() {
            assert_eq!(get(&whole[..cut]), None);
        }
    }
}
