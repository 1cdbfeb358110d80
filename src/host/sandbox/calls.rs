//! Which system calls can be made (seccomp(2)).
//!
//! The list says what serving takes, and what starting this program again takes: a keeper that
//! has died is replaced by the server, and a server by its keeper. Everything else is refused
//! with EPERM, so that a call that was forgotten here fails and doesn't end the guest.

use std::collections::BTreeMap;
use std::io;

use crate::host::procfs::PAGEMAP_SCAN;
use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// System calls that are made with any arguments.
const ALLOWED: &[c_long] = &[
    // Descriptors that are open.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_flock,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fadvise64,
    libc::SYS_readahead,
    libc::SYS_ftruncate,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_pipe2,
    libc::SYS_eventfd2,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_inotify_init1,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_rm_watch,
    // Sockets that are connected, or listen already.
    libc::SYS_accept4,
    libc::SYS_socketpair,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    // Files by path, as far as Landlock lets them.
    libc::SYS_openat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    // Memory of its own.
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    // Threads, processes of its own, and their ends.
    libc::SYS_execve,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_setsid,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getrusage,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_getrandom,
    libc::SYS_getcpu,
    // Only a pidfd that is held already can be signalled: no other can be opened.
    libc::SYS_pidfd_send_signal,
    // Signals to itself, and time.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
];

/// The same by their older numbers, which x86-64 has beside them.
#[cfg(target_arch = "x86_64")]
const ALLOWED_OLDER: &[c_long] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_unlink,
    libc::SYS_rmdir,
    libc::SYS_rename,
    libc::SYS_dup2,
    libc::SYS_pipe,
    libc::SYS_poll,
    libc::SYS_select,
    libc::SYS_epoll_wait,
    libc::SYS_arch_prctl,
    libc::SYS_getrlimit,
    libc::SYS_time,
    libc::SYS_vfork,
    libc::SYS_fork,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_OLDER: &[c_long] = &[];

/// The letter that marks the requests of userfaultfd (`UFFDIO`, ioctl_userfaultfd(2)), and the
/// bits of a request in which it stands.
const UFFDIO: u64 = 0xaa << 8;
const LETTER: u64 = 0xff << 8;

/// Other requests: is it a terminal, how large is it, close-on-exec, non-blocking; what a page map
/// that is open tells. None that types into a terminal (TIOCSTI).
const REQUESTS: [u64; 6] =
    [libc::TCGETS, libc::TIOCGWINSZ, libc::FIONBIO, libc::FIOCLEX, libc::FIONCLEX, PAGEMAP_SCAN];

/// What a process may do with a descriptor (fcntl(2)). None that has the kernel send a signal to
/// somebody (F_SETOWN, F_SETSIG).
const FCNTL: [u64; 7] = [
    libc::F_DUPFD as u64,
    libc::F_DUPFD_CLOEXEC as u64,
    libc::F_GETFD as u64,
    libc::F_SETFD as u64,
    libc::F_GETFL as u64,
    libc::F_SETFL as u64,
    libc::F_GET_SEALS as u64,
];

/// Options of a socket that give a descriptor of the process at its other end, by which that could
/// be signalled (`SO_PASSPIDFD` and `SO_PEERPIDFD`, include/uapi/asm-generic/socket.h).
const PASS_PIDFD: u64 = 76;
const PEER_PIDFD: u64 = 77;

/// What a process may do to itself: the names of threads and of memory, and that exec gives no
/// rights, which holds already.
const PRCTL: [u64; 3] =
    [libc::PR_SET_NAME as u64, libc::PR_SET_VMA as u64, libc::PR_SET_NO_NEW_PRIVS as u64];

/// All kinds of namespaces (`CLONE_NEW*`, clone(2)): in a new user namespace a process would be
/// its own root.
const NAMESPACES: u64 = 0x7e02_0080;

/// Restricts all threads of this process.
pub(super) fn restrict_all() -> io::Result<()> {
    for filter in [no_clone3()?, allowed()?] {
        seccompiler::apply_filter_all_threads(&filter).map_err(|error| match error {
            seccompiler::Error::Seccomp(error) | seccompiler::Error::Prctl(error) => error,
            error => io::Error::other(error),
        })?;
    }
    Ok(())
}

/// Whether this process is inside: its filter refuses a question that hurts nobody, and that is
/// answered everywhere else (PR_GET_NO_NEW_PRIVS, prctl(2)).
pub fn is_inside() -> bool {
    // SAFETY: this prctl(2) takes numbers.
    unsafe { libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) < 0 }
}

/// The filter that allows what is listed, and refuses the rest.
fn allowed() -> io::Result<BpfProgram> {
    let any = |call: &c_long| (*call, Vec::new());
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().chain(ALLOWED_OLDER).map(any).collect();
    let requests = REQUESTS.map(|request| when(1, SeccompCmpOp::Eq, request));
    let uffdio = when(1, SeccompCmpOp::MaskedEq(LETTER), UFFDIO);
    let ioctl = requests.into_iter().chain([uffdio]).collect::<io::Result<_>>()?;
    rules.insert(libc::SYS_ioctl, ioctl);
    let prctl = PRCTL.map(|option| when(0, SeccompCmpOp::Eq, option));
    rules.insert(libc::SYS_prctl, prctl.into_iter().collect::<io::Result<_>>()?);
    let fcntl = FCNTL.map(|command| when(1, SeccompCmpOp::Eq, command));
    rules.insert(libc::SYS_fcntl, fcntl.into_iter().collect::<io::Result<_>>()?);
    for (call, rule) in [
        (libc::SYS_clone, when(0, SeccompCmpOp::MaskedEq(NAMESPACES), 0)?),
        // Limits of its own only: those of others can end them.
        (libc::SYS_prlimit64, when(0, SeccompCmpOp::Eq, 0)?),
        (libc::SYS_getsockopt, when(2, SeccompCmpOp::Ne, PEER_PIDFD)?),
        (libc::SYS_setsockopt, when(2, SeccompCmpOp::Ne, PASS_PIDFD)?),
    ] {
        rules.insert(call, vec![rule]);
    }
    // Left to the other filter: the stricter of two answers holds.
    rules.insert(libc::SYS_clone3, Vec::new());
    program(rules, refuse(libc::EPERM), SeccompAction::Allow)
}

/// The filter that says that there is no clone3(2), whose flags lie in memory, where a filter
/// doesn't see them. The C library then takes clone(2).
fn no_clone3() -> io::Result<BpfProgram> {
    let rules = [(libc::SYS_clone3, Vec::new())].into();
    program(rules, SeccompAction::Allow, refuse(libc::ENOSYS))
}

fn refuse(errno: i32) -> SeccompAction {
    SeccompAction::Errno(errno as u32)
}

/// That the lower half of an argument compares so with a value.
fn when(argument: u8, compares: SeccompCmpOp, value: u64) -> io::Result<SeccompRule> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, compares, value);
    let rule = condition.and_then(|condition| SeccompRule::new(vec![condition]));
    rule.map_err(io::Error::other)
}

fn program(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> io::Result<BpfProgram> {
    let arch: TargetArch = std::env::consts::ARCH.try_into().map_err(io::Error::other)?;
    let filter = SeccompFilter::new(rules, otherwise, listed, arch).map_err(io::Error::other)?;
    filter.try_into().map_err(io::Error::other)
}
