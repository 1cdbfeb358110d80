//! Errors of a guest's record, command line, disks and process.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;

use crate::host::in_use::Protocol;
use crate::kind::{Details, ErrorKind};
use crate::qmp::QmpError;

/// Why a guest could not be recorded, or a recorded one not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// An entry of a process in /proc can't be read.
    #[error("can't read {what} of process {pid}: {source}; it takes the same user or root")]
    ReadProcess {
        /// The process.
        pid: i32,
        /// The entry, in words.
        what: &'static str,
        /// The operating system's reason.
        source: io::Error,
    },

    /// The process at the other end of the control socket is not a QEMU system emulator.
    #[error(
        "process {pid} ({exe}), which owns the control socket, is not a QEMU system \
             emulator; connect to QEMU itself, not to a proxy or manager in front of it"
    )]
    NotQemu {
        /// The process.
        pid: i32,
        /// Its executable.
        exe: String,
    },

    /// Text to be recorded is not UTF-8.
    #[error("{what} of process {pid} is not UTF-8: {text:?}; start QEMU with names that are")]
    NotUtf8 {
        /// The process.
        pid: i32,
        /// What is not UTF-8.
        what: &'static str,
        /// The text, each invalid sequence replaced by U+FFFD.
        text: String,
    },

    /// A command over the control socket failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),

    /// The record has no command line.
    #[error("the recorded command line is empty")]
    EmptyCommandLine,

    /// A given command line can't serve as a machine's record.
    #[error("the given command line can't be used: {problem}")]
    Described {
        /// What is wrong with it.
        problem: String,
    },

    /// Memory can't be mapped from the image.
    #[error(
        "the guest's memory can't be mapped from the image: {problem}; revert with `Placement::Auto`"
    )]
    NotMapped {
        /// What stands in the way.
        problem: String,
    },

    /// A path can't be written on a command line.
    #[error("the {what} {path:?} can't be put on a command line: {problem}")]
    Path {
        /// What the path is for.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },

    /// A path rule that would replace nothing or everything.
    #[error(
        "`RewriteOptions::paths` {old}={new} replaces no path: both sides need a path other than /"
    )]
    PathRule {
        /// The path to replace.
        old: String,
        /// Its replacement.
        new: String,
    },

    /// The recorded command line uses descriptors that QEMU inherited.
    #[error(
        "the recorded option {option} uses a file descriptor that QEMU inherited, which a record \
         can't hold; {remedy}start QEMU yourself with -incoming defer and use `snapback serve`"
    )]
    InheritedDescriptor {
        /// The option.
        option: String,
        /// What else can be done, with "or" behind it; empty when there is nothing.
        remedy: String,
    },

    /// A rule about ports can't be followed.
    #[error("`RewriteOptions::ports` {old}={new}: {problem}")]
    PortRule {
        /// The port to replace.
        old: u16,
        /// Its replacement.
        new: String,
        /// What is wrong with it.
        problem: String,
    },

    /// No recorded option binds a port that is to be replaced.
    #[error(
        "`RewriteOptions::ports` {port}=…: no recorded option binds this port of the host; those \
         that are bound: {known}"
    )]
    NoSuchPort {
        /// The port.
        port: u16,
        /// The ports that the recorded command line binds.
        known: String,
    },

    /// The profile that came with a snapshot can't be used.
    #[error(
        "the snapshot's profile has `{option}` {value:?}, which is not of the form A=B: give that \
         option here, or push the snapshot again"
    )]
    Profile {
        /// The option's name.
        option: String,
        /// Its value.
        value: String,
    },

    /// A rule about network backends can't be followed.
    #[error("`RewriteOptions::netdevs` {id}={spec}: {problem}")]
    NetdevRule {
        /// The backend's id.
        id: String,
        /// The new backend.
        spec: String,
        /// What is wrong with it.
        problem: &'static str,
    },

    /// No recorded network backend has this id.
    #[error(
        "`RewriteOptions::netdevs` {id}=…: no recorded -netdev, -nic or -net has this id; the \
         ids are: {known}"
    )]
    NoSuchNetdev {
        /// The id.
        id: String,
        /// The ids of the recorded network backends. Those without one can't be named.
        known: String,
    },

    /// A port that QEMU would bind is bound already.
    #[error(
        "the recorded option {option} binds {protocol} port {port}, which {who} has bound; \
         replace it with `RewriteOptions::ports` {port}=NEW"
    )]
    PortInUse {
        /// The option.
        option: String,
        /// Of which protocol the port is.
        protocol: Protocol,
        /// The port.
        port: u16,
        /// Who has bound it, in words.
        who: String,
    },

    /// A tap interface is in use.
    #[error(
        "the recorded option {option} uses the tap interface {tap}, to which {who} is attached; \
         give the card another backend with `RewriteOptions::netdevs` {id}=SPEC"
    )]
    TapInUse {
        /// The option.
        option: String,
        /// The interface.
        tap: String,
        /// Who is attached to it, in words.
        who: String,
        /// The backend's id.
        id: String,
    },

    /// A vsock address is in use.
    #[error(
        "the recorded option {option} takes the vsock address {cid}, which is on the command \
         line of {who} too; {advice}"
    )]
    VsockInUse {
        /// The option.
        option: String,
        /// The address (CID, vsock(7)).
        cid: u32,
        /// Who uses it, in words.
        who: String,
        /// How to take another.
        advice: String,
    },

    /// Another process listens on a recorded socket.
    #[error(
        "the recorded option {option} listens on {path}, where a living process listens now; \
         move it with `RewriteOptions::paths` {path}=NEW"
    )]
    SocketInUse {
        /// The option.
        option: String,
        /// The socket's path.
        path: String,
    },

    /// The requested control socket can't be made.
    #[error("`RewriteOptions::qmp` {path}: {problem}; choose another path", path = path.display())]
    ControlSocket {
        /// The socket's path.
        path: PathBuf,
        /// What is in the way.
        problem: String,
    },

    /// Another process has a recorded file open.
    #[error("the recorded option {option} {purpose} {path}, which process {pid} ({process}) has \
             open; move it with `RewriteOptions::paths` {path}=NEW", path = path.display())]
    FileInUse {
        /// The option.
        option: String,
        /// What the option does with the file.
        purpose: &'static str,
        /// The file.
        path: PathBuf,
        /// A process that has it open.
        pid: i32,
        /// That process's name.
        process: String,
    },

    /// A file of a captured disk is missing.
    #[error(
        "the disk {disk} is part of the snapshot, and its file {path} is not there; put it back, \
             or say where it is with {advice}", path = path.display()
    )]
    DiskMissing {
        /// The disk.
        disk: String,
        /// The file.
        path: PathBuf,
        /// The option that names another file.
        advice: String,
    },

    /// A file of a captured disk has changed since the snapshot.
    #[error(
        "the disk {disk} is part of the snapshot, and its file {path} has changed since: {how}; \
             running the guest on it would destroy its file systems. Put back an unchanged copy, or say where one \
             is with {advice}", path = path.display()
    )]
    DiskChanged {
        /// The disk.
        disk: String,
        /// The file.
        path: PathBuf,
        /// The difference.
        how: String,
        /// The option that names another file.
        advice: String,
    },

    /// A file of a captured disk can't be read, or can't be flushed to storage.
    #[error(
        "the file {path} of the disk {disk} can't be read or flushed: {source}",
        path = path.display()
    )]
    DiskUnreadable {
        /// The disk.
        disk: String,
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },

    /// A machine without a generation ID was to be given a new one.
    #[error(
        "`RewriteOptions::new_generation`: this machine was saved without the device vmgenid, \
             and a device can't be added to a saved machine; start the guest with -device \
             vmgenid,guid=auto, and save it again"
    )]
    NoVmgenid,

    /// No options can define some devices that were plugged in.
    #[error(
        "a revert can't bring back what was plugged in: {devices}; unplug it first, or save \
             without it ({advice})"
    )]
    NotReplayable {
        /// The devices, each with the reason.
        devices: String,
        /// How to leave them out.
        advice: String,
    },

    /// The caller names a device that was not plugged in.
    #[error(
        "`SaveOptions::allow_missing_devices` {name}: no such device was plugged in; there are: \
             {known}"
    )]
    NoSuchPlugged {
        /// The name that the caller gave.
        name: String,
        /// The plugged devices.
        known: String,
    },

    /// The caller names a disk that the image doesn't have.
    #[error(
        "`RewriteOptions::disks` {name}=…: the image has no captured disk of that name; it has: {known}"
    )]
    NoSuchDisk {
        /// The name that the caller gave.
        name: String,
        /// The captured disks.
        known: String,
    },

    /// The record of a captured disk lists no files.
    #[error("the image does not name the files of the disk {disk}: use another image")]
    DiskNotRecorded {
        /// The disk.
        disk: String,
    },

    /// No option of the recorded command line defines a captured disk.
    #[error(
        "no option of QEMU's command line defines the disk {disk}, so that a revert can't put an \
             overlay in its place (a file of -readconfig may define it, or QMP did before the guest \
             was started): start QEMU yourself with such a disk, -incoming defer, and use \
             `snapback serve`"
    )]
    DiskNotGiven {
        /// The disk.
        disk: String,
    },

    /// Two captured disks match the same option of the recorded command line.
    #[error(
        "the disks {disk} and {other} can't be told apart on the recorded command line: start \
             QEMU yourself with both, -incoming defer, and use `snapback serve` (disks whose \
             -drive has an id, or whose -blockdev a node-name, are told apart by these)"
    )]
    DisksGivenAsOne {
        /// One of the disks.
        disk: String,
        /// The other.
        other: String,
    },

    /// A disk's overlay can't be created.
    #[error(
        "the overlay of the disk {disk} can't be created in {directory}: {source}; choose \
             another with `OverlayOptions::directory`", directory = directory.display()
    )]
    Overlay {
        /// The disk.
        disk: String,
        /// The directory.
        directory: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },

    /// A guest's own directory can't be made.
    #[error(
        "the directory {path} of the guest's own can't be made ({source}): choose another with \
             `RewriteOptions::own`", path = path.display()
    )]
    OwnDirectory {
        /// The directory.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },

    /// A guest to be discarded would write to its disks.
    #[error(
        "the guest can't be kept from writing to its disks ({disks}), which are defined by \
             -blockdev; harvest from an image of a guest without writable disks"
    )]
    NotIsolated {
        /// The disks.
        disks: String,
    },

    /// What this host has in use can't be found out.
    #[error(transparent)]
    ReadHost(#[from] crate::host::in_use::ReadError),

    /// QEMU's recorded working directory can't be entered.
    #[error("can't start QEMU in its recorded working directory {path}: {source}; create it, or \
             move it with `RewriteOptions::paths` {path}=NEW", path = path.display())]
    WorkingDirectory {
        /// The directory.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },

    /// The QEMU binary can't be executed.
    #[error("can't start {binary}: {source}; name another QEMU with `RewriteOptions::qemu`",
            binary = binary.display())]
    Start {
        /// The program.
        binary: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },

    /// A system call for starting or supervising QEMU failed.
    #[error("can't {what}: {source}")]
    Supervise {
        /// What was being done.
        what: &'static str,
        /// The operating system's reason.
        source: io::Error,
    },

    /// QEMU exited before it answered on its control socket.
    #[error("{binary} ended at once ({status}); its output: {log}", binary = binary.display())]
    Exited {
        /// The program.
        binary: PathBuf,
        /// Its exit status.
        status: ExitStatus,
        /// The end of its output.
        log: String,
    },

    /// QEMU runs but did not answer on its control socket.
    #[error("{binary} started but does not answer on its control socket: {source}; its output: {log}",
            binary = binary.display())]
    NoControl {
        /// The program.
        binary: PathBuf,
        /// What went wrong.
        source: QmpError,
        /// The end of its output.
        log: String,
    },
}

impl GuestError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        use GuestError::*;
        match self {
            ReadProcess { source, .. }
            | DiskUnreadable { source, .. }
            | Overlay { source, .. }
            | OwnDirectory { source, .. }
            | WorkingDirectory { source, .. }
            | Supervise { source, .. } => ErrorKind::of_io(source),
            ReadHost(error) => error.kind(),
            Qmp(error) => error.kind(),
            NotQemu { .. } => ErrorKind::NotQemu,
            NotUtf8 { .. }
            | EmptyCommandLine
            | Described { .. }
            | Path { .. }
            | InheritedDescriptor { .. } => ErrorKind::CommandLineInvalid,
            NotMapped { .. }
            | PathRule { .. }
            | PortRule { .. }
            | Profile { .. }
            | NoSuchPort { .. }
            | NetdevRule { .. }
            | NoSuchNetdev { .. } => ErrorKind::OptionsInvalid,
            PortInUse { .. } => ErrorKind::PortInUse,
            TapInUse { .. } => ErrorKind::TapInUse,
            VsockInUse { .. } => ErrorKind::VsockInUse,
            SocketInUse { .. } => ErrorKind::SocketInUse,
            ControlSocket { .. } => ErrorKind::OptionsInvalid,
            FileInUse { .. } => ErrorKind::FileInUse,
            DiskMissing { .. } => ErrorKind::DiskMissing,
            DiskChanged { .. } => ErrorKind::DiskChanged,
            NoSuchDisk { .. } => ErrorKind::NoSuchDisk,
            DiskNotRecorded { .. }
            | DiskNotGiven { .. }
            | DisksGivenAsOne { .. }
            | NotIsolated { .. } => ErrorKind::DiskUnsupported,
            NoVmgenid | NotReplayable { .. } => ErrorKind::DeviceNotReplayable,
            NoSuchPlugged { .. } => ErrorKind::NoSuchDevice,
            Start { .. } | Exited { .. } | NoControl { .. } => ErrorKind::QemuNotStarted,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        use GuestError::*;
        let (path, pid) = match self {
            Qmp(error) => return error.details(),
            ReadHost(error) => return error.details(),
            ReadProcess { pid, .. } | NotQemu { pid, .. } | NotUtf8 { pid, .. } => {
                (None, Some(*pid))
            }
            SocketInUse { path, .. } => (Some(path.into()), None),
            FileInUse { path, pid, .. } => (Some(path.clone()), Some(*pid)),
            Path { path, .. }
            | ControlSocket { path, .. }
            | DiskMissing { path, .. }
            | DiskChanged { path, .. }
            | DiskUnreadable { path, .. }
            | Overlay { directory: path, .. }
            | WorkingDirectory { path, .. }
            | OwnDirectory { path, .. }
            | Start { binary: path, .. }
            | Exited { binary: path, .. }
            | NoControl { binary: path, .. } => (Some(path.clone()), None),
            _ => (None, None),
        };
        Details::new(&self.to_string(), path, pid)
    }
}
