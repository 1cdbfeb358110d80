//! The limit of the memory that a pool's guests may take. No I/O.
//!
//! A guest that waits stands still, and is counted with what its QEMU has been seen to have of its
//! own. One that is taken may grow until the guest has used all of its memory, so that this is what
//! it is counted with from the start: a limit that looked at what guests use now would be broken a
//! moment later by those that it has let through.

use super::config::PoolSettings;

/// What QEMU has of its own beside the guest's memory: some 35 MiB were seen.
const OF_QEMU: u64 = 64 << 20;

const MIB: u64 = 1 << 20;

/// The limit of a pool, where it has one, and what its guests are counted with.
#[derive(Debug, Default)]
pub(super) struct MemoryLimit {
    limit: Option<u64>,
    /// What a guest that is taken is counted with, where that was said.
    said: Option<u64>,
    /// A guest's memory in bytes, once its image has been seen.
    ram: Option<u64>,
    /// The most that a guest that waits has been seen to have.
    waiting: u64,
}

impl MemoryLimit {
    pub fn of(settings: &PoolSettings) -> MemoryLimit {
        let mut new = MemoryLimit::default();
        new.set(settings);
        new
    }

    /// Takes the settings over that can be changed.
    pub fn set(&mut self, settings: &PoolSettings) {
        self.limit = settings.memory_mib.map(|mib| mib.saturating_mul(MIB));
        self.said = settings.guest_memory_mib.map(|mib| mib.saturating_mul(MIB));
    }

    /// Notes the memory of the image's machine.
    pub fn learn_ram(&mut self, bytes: u64) {
        self.ram = Some(bytes);
    }

    /// Notes what a guest has that waits.
    pub fn learn_waiting(&mut self, bytes: u64) {
        self.waiting = self.waiting.max(bytes);
    }

    /// The limit in bytes.
    pub fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// What a guest that is taken is counted with; none before its image has been seen.
    pub fn guest(&self) -> Option<u64> {
        self.said.or(self.ram.map(|ram| ram + OF_QEMU))
    }

    /// What these guests are counted with together.
    pub fn counted(&self, taken: usize, waiting: u64) -> u64 {
        taken as u64 * self.guest().unwrap_or_default() + waiting
    }

    /// Whether one guest alone is within the limit.
    pub fn holds_one(&self) -> bool {
        let needed = self.guest().unwrap_or_default();
        self.limit.is_none_or(|limit| needed <= limit)
    }

    /// Whether a guest may be armed that is to wait beside these. One of those that wait has to find
    /// room once all others have been released, or none could be taken ever.
    pub fn may_arm(&self, taken: usize, waiting: u64) -> bool {
        let Some(limit) = self.limit else { return true };
        let guest = self.guest().unwrap_or_default();
        self.counted(taken, waiting) + self.waiting <= limit && waiting + guest <= limit
    }

    /// Whether one of those that wait, which has so many bytes, may be taken. The first may in any
    /// case: what those that wait have is not known ahead, and may have turned out too much.
    pub fn may_take(&self, taken: usize, waiting: u64, own: u64) -> bool {
        let after = self.counted(taken + 1, waiting.saturating_sub(own));
        taken == 0 || self.limit.is_none_or(|limit| after <= limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A limit in MiB for guests of 100 MiB, and so of 164 with their QEMU, that wait with 30.
    fn limited(mib: u64) -> MemoryLimit {
        let settings = PoolSettings { memory_mib: Some(mib), ..PoolSettings::new("/a") };
        let mut limit = MemoryLimit::of(&settings);
        limit.learn_ram(100 * MIB);
        limit.learn_waiting(30 * MIB);
        limit
    }

    #[test]
    fn guests_are_counted_with_what_they_may_come_to() {
        let limit = limited(400);
        assert_eq!(limit.counted(2, 30 * MIB), 358 * MIB);
        assert!(limit.may_take(1, 60 * MIB, 30 * MIB) && !limit.may_take(2, 30 * MIB, 30 * MIB));
        assert!(limit.may_arm(2, 30 * MIB) && !limit.may_arm(2, 60 * MIB));
        assert!(limited(164).holds_one() && !limited(163).holds_one());
    }

    #[test]
    fn those_that_wait_leave_room_for_one_of_them() {
        let limit = limited(200);
        assert!(limit.may_arm(0, 30 * MIB) && !limit.may_arm(0, 60 * MIB));
        assert!(limit.may_take(0, 60 * MIB, 30 * MIB));
        // They had more than was expected.
        assert!(limit.may_take(0, 300 * MIB, 150 * MIB));
    }

    #[test]
    fn what_was_said_takes_the_place_of_what_is_possible() {
        let settings = PoolSettings {
            memory_mib: Some(200),
            guest_memory_mib: Some(50),
            ..PoolSettings::new("/a")
        };
        let mut limit = MemoryLimit::of(&settings);
        limit.learn_ram(100 * MIB);
        assert_eq!(limit.guest(), Some(50 * MIB));
        assert!(limit.may_take(3, 10 * MIB, 10 * MIB) && !limit.may_take(4, 10 * MIB, 10 * MIB));
        let none = MemoryLimit::of(&PoolSettings::new("/a"));
        assert!(none.may_arm(1000, u64::MAX / 2) && none.may_take(1000, 0, 0) && none.holds_one());
    }
}
