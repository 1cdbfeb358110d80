//! The machine's power button: who presses it wants the machine to be off.

use std::fs::{self, File};
use std::io::{self, Read};
use std::thread;

/// `struct input_event` of linux/input.h on 64 bits: the time, two words, a number.
const EVENT: usize = 24;

/// Behind the time, when the key goes down: `EV_KEY` and `KEY_POWER` of
/// linux/input-event-codes.h, and 1.
const POWER_PRESSED: [u8; 8] = [1, 0, 116, 0, 1, 0, 0, 0];

/// Turns the machine off when its button is pressed. The kernel tells of that by the modules
/// `button` and `evdev`; without them there is nothing to listen to.
pub fn heed() -> io::Result<()> {
    for entry in fs::read_dir("/dev/input").into_iter().flatten() {
        let device = File::open(entry?.path())?;
        thread::spawn(move || listen(device));
    }
    Ok(())
}

fn listen(mut device: File) {
    let mut event = [0; EVENT];
    while device.read_exact(&mut event).is_ok() {
        if event[16..] == POWER_PRESSED {
            // SAFETY: takes no pointer. Should it fail, there is nothing else to do.
            unsafe { libc::reboot(libc::RB_POWER_OFF) };
        }
    }
}
