//! One device's section in saved device state, which holds no lengths.

use crate::wire::section::{FOOTER, FULL, MARK_BYTES, SUBSECTION};

/// Where in `devices` the body of a section begins. `name` is its name with its length,
/// instance and version, as they follow the section's number, and `len` the length of its
/// body in bytes. What looks like it by chance is told by its end: the section's number is
/// there again, or a subsection begins.
pub(super) fn body(devices: &[u8], name: &[u8], len: usize) -> Option<usize> {
    let is_it = |at: usize| {
        let end = at + name.len() + len;
        let (mark, number) = (devices[at - MARK_BYTES], &devices[at - MARK_BYTES + 1..at]);
        let ends = match devices.get(end) {
            Some(&FOOTER) => devices.get(end + 1..end + MARK_BYTES) == Some(number),
            Some(&SUBSECTION) => true,
            _ => false,
        };
        mark == FULL && ends
    };
    let mut places = devices.windows(name.len()).enumerate().skip(MARK_BYTES);
    let (at, _) = places.find(|(at, window)| *window == name && is_it(*at))?;
    Some(at + name.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &[u8] = b"\x02ab\0\0\0\0\0\0\0\x01";

    #[test]
    fn a_section_is_known_by_its_end() {
        let state = |end: &[u8]| [b"before\x04\0\0\0\x09", NAME, b"body", end, b"after"].concat();
        for end in [&b"\x7e\0\0\0\x09"[..], b"\x05"] {
            let state = state(end);
            let at = body(&state, NAME, 4).unwrap();
            assert_eq!(&state[at..at + 4], b"body");
        }
        for state in [
            state(b"\x7e\0\0\0\x08"),
            state(b"\0\0\0\0\0"),
            state(b"")[..20].to_vec(),
            NAME.to_vec(),
            Vec::new(),
        ] {
            assert_eq!(body(&state, NAME, 4), None);
        }
    }
}
