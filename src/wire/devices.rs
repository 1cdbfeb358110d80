//! The state of devices that QEMU writes by itself, without a migration (`qemu_save_device_state`
//! in `migration/savevm.c`): a header, the sections of all devices, the end-of-file mark.

use super::{FILE_MAGIC, FILE_VERSION, WireError, section};

/// Length in bytes of the header.
const HEADER_BYTES: usize = 8;

/// The device sections alone, as they stand in a migration stream.
///
/// # Errors
/// [`WireError::NotAStream`], and [`WireError::Malformed`] where it isn't whole.
pub(crate) fn sections(mut state: Vec<u8>) -> Result<Vec<u8>, WireError> {
    let word = |at: usize| {
        let bytes = state.get(at..at + 4).and_then(|bytes| bytes.first_chunk());
        bytes.map_or(0, |bytes| u32::from_be_bytes(*bytes))
    };
    let (magic, version) = (word(0), word(4));
    if (magic, version) != (FILE_MAGIC, FILE_VERSION) {
        return Err(WireError::NotAStream { magic, version });
    }
    let at = state.len() as u64;
    if state.get(HEADER_BYTES) != Some(&section::FULL) || state.pop() != Some(section::EOF) {
        let what = "the state of the devices is incomplete".to_owned();
        return Err(WireError::Malformed { at, what });
    }
    state.drain(..HEADER_BYTES);
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_stand_between_header_and_mark() {
        let state = b"QEVM\0\0\0\x03\x04section\0";
        assert_eq!(sections(state.to_vec()).unwrap(), b"\x04section");
        for cut in 0..state.len() {
            assert!(sections(state[..cut].to_vec()).is_err(), "{cut}");
        }
    }
}
