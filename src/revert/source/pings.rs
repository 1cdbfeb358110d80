//! The PINGs that a source sends, and the PONGs by which QEMU says how far it has read.

use std::sync::mpsc;

/// QEMU has read the opening.
pub(super) const OPENED: u32 = 1;
/// Its userfaultfd is set up.
pub(super) const LISTENING: u32 = 2;
/// The device state is in.
pub(super) const LOADED: u32 = 3;
/// The pages sent as probes have been installed.
pub(super) const PROBED: u32 = 4;

/// QEMU has taken in all that a server sent which has died. Its successors count on from here.
pub(super) const TAKEN_OVER: u32 = 0x100;

/// The answers as they come, handed on by the thread that reads the return path.
pub(super) struct Pongs {
    heard: mpsc::Receiver<u32>,
    loaded: bool,
}

impl Pongs {
    pub fn new(heard: mpsc::Receiver<u32>) -> Pongs {
        Pongs { heard, loaded: false }
    }

    /// Those of a QEMU that has loaded the device state.
    pub fn behind_loaded(heard: mpsc::Receiver<u32>) -> Pongs {
        Pongs { heard, loaded: true }
    }

    /// Waits until QEMU has taken in all that was sent ahead of this PING; false when the source
    /// has ended.
    pub fn taken_in(&mut self, value: u32) -> bool {
        self.next(value)
    }

    /// Waits until the device state is in; false when the source has ended before.
    pub fn loaded(&mut self) -> bool {
        if !self.loaded {
            self.loaded = self.next(LOADED);
        }
        self.loaded
    }

    /// Waits for the next answer to a PING behind probes; false when the source has ended.
    pub fn probed(&mut self) -> bool {
        self.next(PROBED)
    }

    fn next(&mut self, value: u32) -> bool {
        self.heard.iter().any(|pong| pong == value)
    }
}
