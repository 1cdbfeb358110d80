//! What can go wrong with a virtual machine's record or process.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;

use crate::qmp::QmpError;

/// Why a machine could not be captured, rewritten or started.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// Something about a process can't be read.
    #[error("can't read {what} of process {pid}: {source}; it takes the same user or root")]
    ReadProcess {
        /// The process.
        pid: i32,
        /// What was to be read.
        what: &'static str,
        /// The operating system's reason.
        source: io::Error,
    },

    /// The process that made the control socket is not a QEMU system emulator.
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

    /// A text that has to be recorded is not UTF-8.
    #[error("{what} of process {pid} is not UTF-8: {text:?}; start QEMU with names that are")]
    NotUtf8 {
        /// The process.
        pid: i32,
        /// What is not UTF-8.
        what: &'static str,
        /// The text with what can't be shown replaced.
        text: String,
    },

    /// A command over the control socket failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),

    /// The record has no command line.
    #[error("the recorded command line is empty")]
    EmptyCommandLine,

    /// A command line that was given can't be a machine's record.
    #[error("the command line that was given can't be used: {problem}")]
    Described {
        /// What is wrong with it.
        problem: String,
    },

    /// Memory can't be mapped from the image.
    #[error(
        "the guest's memory can't be mapped from the image: {problem}; revert with --place auto"
    )]
    NotMapped {
        /// What stands in the way.
        problem: String,
    },

    /// A path that goes on a command line can't be written there.
    #[error("the {what} {path:?} can't be put on a command line: {problem}")]
    Path {
        /// What the path is for.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },

    /// A rule for replacing paths that would replace nothing or everything.
    #[error("--path {old}={new} replaces no path: both sides need a path other than /")]
    PathRule {
        /// What was to be replaced.
        old: String,
        /// What was to take its place.
        new: String,
    },

    /// The recorded command line used descriptors that its starter passed on.
    #[error(
        "the recorded option {option} uses a file descriptor which whoever started QEMU \
             passed on to it, and that can't be passed again from a record; start QEMU yourself \
             with -incoming defer and use `snapback serve`"
    )]
    InheritedDescriptor {
        /// The option.
        option: String,
    },

    /// A recorded listening socket belongs to a living process.
    #[error(
        "the recorded option {option} listens at {path}, where a living process listens \
             now; give it another place with --path {path}=NEW"
    )]
    SocketInUse {
        /// The option.
        option: String,
        /// Where it listens.
        path: String,
    },

    /// The control socket that was asked for can't be made.
    #[error("--qmp {path}: {problem}; choose another path", path = path.display())]
    ControlSocket {
        /// The socket's path.
        path: PathBuf,
        /// What is there.
        problem: String,
    },

    /// A recorded file is in use.
    #[error("the recorded option {option} {purpose} {path}, which process {pid} ({process}) has \
             open; give it another place with --path {path}=NEW", path = path.display())]
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

    /// A file of a captured disk is gone.
    #[error(
        "the disk {disk} is part of the snapshot, and its file {path} is not there; put it back, \
             or say where it is with {advice}", path = path.display()
    )]
    DiskMissing {
        /// The disk.
        disk: String,
        /// The file.
        path: PathBuf,
        /// The option that points elsewhere.
        advice: String,
    },

    /// A file of a captured disk is not what it was.
    #[error(
        "the disk {disk} is part of the snapshot, and its file {path} was changed since: {how}; \
             the guest would destroy what is on it. Put back an unchanged copy, or say where one \
             is with {advice}", path = path.display()
    )]
    DiskChanged {
        /// The disk.
        disk: String,
        /// The file.
        path: PathBuf,
        /// What is different.
        how: String,
        /// The option that points elsewhere.
        advice: String,
    },

    /// A file of a captured disk can't be looked at, or not be written out to storage.
    #[error(
        "the file {path} of the disk {disk} can't be read or written out: {source}",
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

    /// A disk that the caller points to is none of the image's.
    #[error("--disk {name}=…: the image has no captured disk of that name; it has: {known}")]
    NoSuchDisk {
        /// What the caller called it.
        name: String,
        /// The captured disks.
        known: String,
    },

    /// A captured disk is recorded without its files.
    #[error("the image does not say what the disk {disk} consists of: take another image")]
    DiskNotRecorded {
        /// The disk.
        disk: String,
    },

    /// No option of the recorded command line gives a captured disk.
    #[error(
        "the disk {disk} is not on the recorded command line, so it was plugged in later, and a \
             revert can't do that: start QEMU yourself with such a disk, -incoming defer, and use \
             `snapback serve`"
    )]
    DiskNotGiven {
        /// The disk.
        disk: String,
    },

    /// One option of the recorded command line would give two captured disks.
    #[error(
        "the disks {disk} and {other} can't be told apart on the recorded command line: start \
             QEMU yourself with both, -incoming defer, and use `snapback serve` (disks whose \
             -drive has an id, or whose -blockdev a node-name, are told apart by these)"
    )]
    DisksGivenAsOne {
        /// The one disk.
        disk: String,
        /// The other.
        other: String,
    },

    /// Devices were plugged in that no option can give.
    #[error(
        "a revert can't bring back what was plugged in: {devices}; unplug it first, or save \
             without it ({advice})"
    )]
    NotReplayable {
        /// The devices, each with the reason.
        devices: String,
        /// The options that leave them out.
        advice: String,
    },

    /// A device that may be left out is none that was plugged in.
    #[error("--allow-missing-device {name}: no such device was plugged in; there are: {known}")]
    NoSuchPlugged {
        /// What the caller called it.
        name: String,
        /// The plugged devices.
        known: String,
    },

    /// The file for a disk's changes can't be made.
    #[error(
        "the overlay of the disk {disk} can't be made in {folder}: {source}; choose another \
             folder with --overlay-dir", folder = folder.display()
    )]
    Overlay {
        /// The disk.
        disk: String,
        /// The folder.
        folder: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },

    /// A guest that is thrown away would write to its disks.
    #[error(
        "the guest can't be kept from writing to its disks ({disks}), which were given by \
             -blockdev: harvest from an image of a guest without writable disks"
    )]
    NotIsolated {
        /// The disks.
        disks: String,
    },

    /// The state of this host can't be looked up.
    #[error(transparent)]
    ReadHost(#[from] crate::host::in_use::ReadError),

    /// The folder that relative paths start from is not there.
    #[error("can't start QEMU in its recorded working folder {path}: {source}; make it, or give \
             another with --path {path}=NEW", path = path.display())]
    WorkingFolder {
        /// The folder.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },

    /// QEMU could not be started at all.
    #[error("can't start {binary}: {source}; name another QEMU with --qemu",
            binary = binary.display())]
    Start {
        /// The program.
        binary: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },

    /// A part of starting or watching QEMU failed on our side.
    #[error("can't {what}: {source}")]
    Supervise {
        /// What was being done.
        what: &'static str,
        /// The operating system's reason.
        source: io::Error,
    },

    /// QEMU ended before it spoke.
    #[error("{binary} ended at once ({status}); it said: {log}", binary = binary.display())]
    Exited {
        /// The program.
        binary: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it wrote.
        log: String,
    },

    /// QEMU lives but did not speak over its control socket.
    #[error("{binary} started but does not talk: {source}; it said: {log}",
            binary = binary.display())]
    NoControl {
        /// The program.
        binary: PathBuf,
        /// What went wrong.
        source: QmpError,
        /// The end of what it wrote.
        log: String,
    },
}
