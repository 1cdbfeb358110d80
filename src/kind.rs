//! What programs tell errors apart by.

use std::path::PathBuf;

/// Makes the enum of all kinds, and the code of each.
macro_rules! kinds {
    ($($(#[doc = $doc:literal])* $kind:ident = $code:literal,)*) => {
        /// What kind of error it is: for programs to act on, where its message is for people. Kinds
        /// are added as the program grows; what one means stays.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum ErrorKind {
            $($(#[doc = $doc])* $kind,)*
        }

        impl ErrorKind {
            /// All kinds.
            pub(crate) const ALL: &[ErrorKind] = &[$(ErrorKind::$kind,)*];

            /// The kind as a word that never changes, such as `disk_changed`.
            pub fn code(self) -> &'static str {
                match self {
                    $(ErrorKind::$kind => $code,)*
                }
            }
        }
    };
}

kinds! {
    /// The guest's agent does not answer, or refuses.
    AgentFailed = "agent_failed",
    /// Some machines were not backed up; others were.
    BackupFailed = "backup_failed",
    /// Some clones of a guest were not brought back; others were.
    ClonesFailed = "clones_failed",
    /// A command line can't be used.
    CommandLineInvalid = "command_line_invalid",
    /// A revert can't bring back a device that was plugged in, or do with one what was asked.
    DeviceNotReplayable = "device_not_replayable",
    /// Another daemon runs with the same state or at the same address.
    DaemonRunning = "daemon_running",
    /// No daemon answers.
    DaemonUnreachable = "daemon_unreachable",
    /// A domain of that name runs.
    DomainRuns = "domain_runs",
    /// A file of a captured disk has changed since the snapshot.
    DiskChanged = "disk_changed",
    /// A file of a captured disk is missing.
    DiskMissing = "disk_missing",
    /// A disk can't be captured, told apart, or kept from being written.
    DiskUnsupported = "disk_unsupported",
    /// There is a file of that name, and it was not to be replaced.
    FileExists = "file_exists",
    /// Another process has a file open that the guest would use.
    FileInUse = "file_in_use",
    /// Whoever asks may not have that done.
    Forbidden = "forbidden",
    /// The guest's state changed while it was being saved.
    GuestChanged = "guest_changed",
    /// The guest is in a state in which it can't be saved.
    GuestState = "guest_state",
    /// Something in the guest rules out a snapshot.
    GuestUnsupported = "guest_unsupported",
    /// A command that was to be run at the moment, or once the guest ran, failed.
    HookFailed = "hook_failed",
    /// This host lacks something that is needed.
    HostUnsupported = "host_unsupported",
    /// An image is damaged, truncated or unfinished.
    ImageDamaged = "image_damaged",
    /// An image of a later format.
    ImageTooNew = "image_too_new",
    /// A file to be converted is of no known format, or damaged.
    InputInvalid = "input_invalid",
    /// A bug of snapback.
    Internal = "internal",
    /// Cancelled.
    Interrupted = "interrupted",
    /// The system refused to read, write or create something.
    Io = "io",
    /// Not all that a failed save had changed could be undone.
    LeftOver = "left_over",
    /// A key can't be used, or opens nothing.
    KeyInvalid = "key_invalid",
    /// libvirt refused something, or failed at it.
    LibvirtRefused = "libvirt_refused",
    /// libvirt does not answer.
    LibvirtUnreachable = "libvirt_unreachable",
    /// The memory of a reverted guest is not complete yet.
    MemoryIncomplete = "memory_incomplete",
    /// A migration is under way in this QEMU.
    MigrationActive = "migration_active",
    /// The guest asked for no memory.
    NothingDemanded = "nothing_demanded",
    /// Whoever holds QEMU's monitor, such as libvirt, did not carry a command there and back.
    MonitorFailed = "monitor_failed",
    /// No guest of that id or name is taken.
    NoSuchGuest = "no_such_guest",
    /// There is no pool of that name.
    NoSuchPool = "no_such_pool",
    /// There is no repository at an address.
    NoRepository = "no_repository",
    /// There is no device of that name.
    NoSuchDevice = "no_such_device",
    /// libvirt has no domain of that name.
    NoSuchDomain = "no_such_domain",
    /// There is not enough room.
    NoSpace = "no_space",
    /// A guest can't be reset inside its QEMU.
    NotResettable = "not_resettable",
    /// There is no snapshot of that name in a repository.
    NoSuchSnapshot = "no_such_snapshot",
    /// There is no disk of that name.
    NoSuchDisk = "no_such_disk",
    /// The file is no image.
    NotAnImage = "not_an_image",
    /// Nobody saves an image such that it can be followed.
    NotFollowed = "not_followed",
    /// There is no such file.
    NotFound = "not_found",
    /// The image is whole, but its guest could not be shown to run again.
    NotProved = "not_proved",
    /// The process that answers is not QEMU, or another one than it should be.
    NotQemu = "not_qemu",
    /// Options contradict each other or the file that they are for.
    OptionsInvalid = "options_invalid",
    /// An image that another one refers to is missing or is another one.
    ParentMissing = "parent_missing",
    /// The system forbids something.
    PermissionDenied = "permission_denied",
    /// A pool has no guests and can't start any.
    PoolDegraded = "pool_degraded",
    /// No guest of a pool was to be had in time.
    PoolExhausted = "pool_exhausted",
    /// There is a pool, or a guest, of that name.
    PoolExists = "pool_exists",
    /// A port that the guest would bind is bound already.
    PortInUse = "port_in_use",
    /// QEMU ended, or closed its connection.
    QemuEnded = "qemu_ended",
    /// QEMU failed to save or load the guest.
    QemuFailed = "qemu_failed",
    /// QEMU can't be started.
    QemuNotStarted = "qemu_not_started",
    /// QEMU's answers or its stream could not be understood.
    QemuProtocol = "qemu_protocol",
    /// QEMU refused a command.
    QemuRefused = "qemu_refused",
    /// QEMU did not answer in time.
    QemuTimeout = "qemu_timeout",
    /// QEMU is too old for this.
    QemuTooOld = "qemu_too_old",
    /// Nothing answers at QEMU's control socket.
    QemuUnreachable = "qemu_unreachable",
    /// Something in a repository is missing, or is not what it should be.
    RepositoryDamaged = "repository_damaged",
    /// There is a repository at an address already.
    RepositoryExists = "repository_exists",
    /// A repository of a later format.
    RepositoryTooNew = "repository_too_new",
    /// A repository may be another one in the place of that which is meant.
    RepositoryUntrusted = "repository_untrusted",
    /// A request to a daemon can't be understood, or asks for what can't be.
    RequestInvalid = "request_invalid",
    /// A save that was killed has to be cleaned up first.
    SaveUnfinished = "save_unfinished",
    /// The page server of a guest died, and no other can go on in its place.
    ServerLost = "server_lost",
    /// A snapshot of a repository is not signed with a key that is trusted.
    SnapshotUntrusted = "snapshot_untrusted",
    /// A living process listens on a socket that the guest would use.
    SocketInUse = "socket_in_use",
    /// The image is whole, but the guest's file systems may still be frozen.
    StillFrozen = "still_frozen",
    /// A store does not accept the credentials, or they don't suffice.
    StoreDenied = "store_denied",
    /// A store refused a request.
    StoreRefused = "store_refused",
    /// A store asked for fewer requests, until time ran out.
    StoreThrottled = "store_throttled",
    /// A store could not be reached, or failed, until time ran out.
    StoreUnreachable = "store_unreachable",
    /// A tap interface that the guest would use is in use.
    TapInUse = "tap_in_use",
    /// A request to a daemon has no token, or a wrong one.
    Unauthorized = "unauthorized",
    /// Memory can't be served by userfaultfd.
    UserfaultfdUnavailable = "userfaultfd_unavailable",
    /// A vsock address that the guest would take is taken.
    VsockInUse = "vsock_in_use",
    /// No working set has been recorded, or it can't be used.
    WorkingSetMissing = "working_set_missing",
}

impl ErrorKind {
    /// Whether the same may succeed later with nothing changed by hand.
    pub fn retryable(self) -> bool {
        use ErrorKind::*;
        matches!(
            self,
            DaemonUnreachable
                | FileInUse
                | GuestChanged
                | Interrupted
                | LibvirtUnreachable
                | MemoryIncomplete
                | MigrationActive
                | MonitorFailed
                | PoolDegraded
                | PoolExhausted
                | PortInUse
                | QemuTimeout
                | SocketInUse
                | StoreThrottled
                | StoreUnreachable
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
        let details =
            Details::new("\u{60}/a\u{60} is in use: set \u{60}XOptions::b\u{60}", Some("/a"), None);
        assert_eq!(details.option.as_deref(), Some("XOptions::b"));
        assert_eq!(details.path, Some("/a".into()));
    }
}
