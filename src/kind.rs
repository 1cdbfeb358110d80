//! What programs tell errors apart by.

use std::path::PathBuf;

/// What kind of error it is: for programs to act on, where its message is for people. Kinds are
/// added as the program grows; what one means stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The guest's agent does not answer, or refuses.
    AgentFailed,
    /// A command line can't be used.
    CommandLineInvalid,
    /// A revert can't bring back a device that was plugged in.
    DeviceNotReplayable,
    /// A file of a captured disk has changed since the snapshot.
    DiskChanged,
    /// A file of a captured disk is missing.
    DiskMissing,
    /// A disk can't be captured, told apart, or kept from being written.
    DiskUnsupported,
    /// There is a file of that name, and it was not to be replaced.
    FileExists,
    /// Another process has a file open that the guest would use.
    FileInUse,
    /// The guest's state changed while it was being saved.
    GuestChanged,
    /// The guest is in a state in which it can't be saved.
    GuestState,
    /// Something in the guest rules out a snapshot.
    GuestUnsupported,
    /// A command that was to be run at the moment failed.
    HookFailed,
    /// This host lacks something that is needed.
    HostUnsupported,
    /// An image is damaged, truncated or unfinished.
    ImageDamaged,
    /// An image of a later format.
    ImageTooNew,
    /// A file to be converted is of no known format, or damaged.
    InputInvalid,
    /// A bug of snapback.
    Internal,
    /// Cancelled.
    Interrupted,
    /// The system refused to read, write or create something.
    Io,
    /// Not all that a failed save had changed could be undone.
    LeftOver,
    /// The memory of a reverted guest is not complete yet.
    MemoryIncomplete,
    /// A migration is under way in this QEMU.
    MigrationActive,
    /// The guest asked for no memory.
    NothingDemanded,
    /// There is no device of that name.
    NoSuchDevice,
    /// There is not enough room.
    NoSpace,
    /// There is no disk of that name.
    NoSuchDisk,
    /// The file is no image.
    NotAnImage,
    /// There is no such file.
    NotFound,
    /// The image is whole, but its guest could not be shown to run again.
    NotProved,
    /// The process that answers is not QEMU, or another one than it should be.
    NotQemu,
    /// Options contradict each other or the file that they are for.
    OptionsInvalid,
    /// An image that another one refers to is missing or is another one.
    ParentMissing,
    /// The system forbids something.
    PermissionDenied,
    /// Somebody has bound a port of the host that the guest would use.
    PortInUse,
    /// QEMU ended, or closed its connection.
    QemuEnded,
    /// QEMU failed to save or load the guest.
    QemuFailed,
    /// QEMU can't be started.
    QemuNotStarted,
    /// QEMU's answers or its stream could not be understood.
    QemuProtocol,
    /// QEMU refused a command.
    QemuRefused,
    /// QEMU did not answer in time.
    QemuTimeout,
    /// QEMU is too old for this.
    QemuTooOld,
    /// Nothing answers at QEMU's control socket.
    QemuUnreachable,
    /// A save that was killed has to be cleaned up first.
    SaveUnfinished,
    /// The page server of a guest died, and no other can go on in its place.
    ServerLost,
    /// A living process listens on a socket that the guest would use.
    SocketInUse,
    /// The image is whole, but the guest's file systems may still be frozen.
    StillFrozen,
    /// Somebody is attached to a tap interface that the guest would use.
    TapInUse,
    /// Memory can't be served by userfaultfd.
    UserfaultfdUnavailable,
    /// Another guest has the vsock address that this one would take.
    VsockInUse,
    /// No working set has been recorded, or it can't be used.
    WorkingSetMissing,
}

impl ErrorKind {
    /// All kinds.
    #[rustfmt::skip]
    pub(crate) const ALL: &[ErrorKind] = {
        use ErrorKind::*;
        &[
            AgentFailed, CommandLineInvalid, DeviceNotReplayable, DiskChanged, DiskMissing, DiskUnsupported, FileExists,
            FileInUse, GuestChanged, GuestState, GuestUnsupported, HookFailed, HostUnsupported,
            ImageDamaged,
            ImageTooNew, InputInvalid, Internal, Interrupted, Io, LeftOver, MemoryIncomplete,
            MigrationActive, NothingDemanded, NoSuchDevice, NoSpace, NoSuchDisk, NotAnImage, NotFound, NotProved, NotQemu,
            OptionsInvalid, ParentMissing, PermissionDenied, PortInUse, QemuEnded, QemuFailed, QemuNotStarted,
            QemuProtocol, QemuRefused, QemuTimeout, QemuTooOld, QemuUnreachable, SaveUnfinished,
            ServerLost, SocketInUse, StillFrozen, TapInUse, UserfaultfdUnavailable, VsockInUse, WorkingSetMissing,
        ]
    };

    /// The kind as a word that never changes, such as `disk_changed`.
    pub fn code(self) -> &'static str {
        use ErrorKind::*;
        match self {
            AgentFailed => "agent_failed",
            CommandLineInvalid => "command_line_invalid",
            DeviceNotReplayable => "device_not_replayable",
            DiskChanged => "disk_changed",
            DiskMissing => "disk_missing",
            DiskUnsupported => "disk_unsupported",
            FileExists => "file_exists",
            FileInUse => "file_in_use",
            GuestChanged => "guest_changed",
            GuestState => "guest_state",
            GuestUnsupported => "guest_unsupported",
            HookFailed => "hook_failed",
            HostUnsupported => "host_unsupported",
            ImageDamaged => "image_damaged",
            ImageTooNew => "image_too_new",
            InputInvalid => "input_invalid",
            Internal => "internal",
            Interrupted => "interrupted",
            Io => "io",
            LeftOver => "left_over",
            MemoryIncomplete => "memory_incomplete",
            MigrationActive => "migration_active",
            NothingDemanded => "nothing_demanded",
            NoSuchDevice => "no_such_device",
            NoSpace => "no_space",
            NoSuchDisk => "no_such_disk",
            NotAnImage => "not_an_image",
            NotFound => "not_found",
            NotProved => "not_proved",
            NotQemu => "not_qemu",
            OptionsInvalid => "options_invalid",
            ParentMissing => "parent_missing",
            PermissionDenied => "permission_denied",
            PortInUse => "port_in_use",
            QemuEnded => "qemu_ended",
            QemuFailed => "qemu_failed",
            QemuNotStarted => "qemu_not_started",
            QemuProtocol => "qemu_protocol",
            QemuRefused => "qemu_refused",
            QemuTimeout => "qemu_timeout",
            QemuTooOld => "qemu_too_old",
            QemuUnreachable => "qemu_unreachable",
            SaveUnfinished => "save_unfinished",
            ServerLost => "server_lost",
            SocketInUse => "socket_in_use",
            StillFrozen => "still_frozen",
            TapInUse => "tap_in_use",
            UserfaultfdUnavailable => "userfaultfd_unavailable",
            VsockInUse => "vsock_in_use",
            WorkingSetMissing => "working_set_missing",
        }
    }

    /// Whether the same may succeed later with nothing changed by hand.
    pub fn retryable(self) -> bool {
        use ErrorKind::*;
        matches!(
            self,
            FileInUse
                | GuestChanged
                | Interrupted
                | MemoryIncomplete
                | MigrationActive
                | QemuTimeout
                | PortInUse
                | SocketInUse
                | TapInUse
                | VsockInUse
        )
    }

    /// The kind of an operating system's error.
    pub(crate) fn of_io(error: &std::io::Error) -> ErrorKind {
        use std::io::ErrorKind as Io;
        match error.kind() {
            Io::NotFound => ErrorKind::NotFound,
            Io::AlreadyExists => ErrorKind::FileExists,
            Io::PermissionDenied | Io::ReadOnlyFilesystem => ErrorKind::PermissionDenied,
            Io::StorageFull | Io::QuotaExceeded => ErrorKind::NoSpace,
            Io::TimedOut => ErrorKind::QemuTimeout,
            _ => ErrorKind::Io,
        }
    }
}

/// Stands before and behind a name in a message: a backtick.
const QUOTE: char = '\u{60}';

/// What an error is about, as far as that is one thing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Details {
    /// The file, directory or socket.
    pub path: Option<PathBuf>,
    /// The process.
    pub pid: Option<i32>,
    /// The option to change, by its field, such as `RewriteOptions::paths`.
    pub option: Option<String>,
}

impl Details {
    /// Of an error with this message, which names the option to change between backticks.
    pub(crate) fn new(
        message: &str,
        path: Option<impl Into<PathBuf>>,
        pid: Option<i32>,
    ) -> Details {
        let mut quoted = message.split(QUOTE).skip(1).step_by(2);
        let option = quoted.find(|quoted| quoted.contains("Options::")).map(str::to_owned);
        Details { path: path.map(Into::into), pid, option }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_kind_has_a_code_of_its_own() {
        let codes: HashSet<_> = ErrorKind::ALL.iter().map(|kind| kind.code()).collect();
        assert_eq!(codes.len(), ErrorKind::ALL.len());
        for kind in ErrorKind::ALL {
            let words = kind.code().split('_').map(|word| word[..1].to_uppercase() + &word[1..]);
            assert_eq!(words.collect::<String>(), format!("{kind:?}"));
        }
    }

    #[test]
    fn the_option_to_change_is_the_one_that_the_message_names() {
        let details = Details::new("\u{60}/a\u{60} is in use: set \u{60}XOptions::b\u{60}", Some("/a"), None);
        assert_eq!(details.option.as_deref(), Some("XOptions::b"));
        assert_eq!(details.path, Some("/a".into()));
    }
}
