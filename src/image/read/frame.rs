//! The header of a zstd frame.

/// The frame header descriptor, behind the magic number (RFC 8878, 3.1.1.1.1).
const DESCRIPTOR: usize = 4;

/// The bits of the descriptor that mean nothing: `Unused_bit` and `Reserved_bit`.
const MEANINGLESS: u8 = 0b0001_1000;

/// Checks bits of a frame that its decoder ignores: the encoder writes them as zeros.
///
/// # Errors
/// Says what is wrong.
pub(super) fn check_header(frame: &[u8]) -> Result<(), &'static str> {
    match frame.get(DESCRIPTOR) {
        Some(descriptor) if descriptor & MEANINGLESS != 0 => {
            Err("an unused bit of its zstd frame's header is set")
        }
        _ => Ok(()),
    }
}
