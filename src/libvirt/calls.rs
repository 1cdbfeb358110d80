//! Calls of libvirt's library that the crate `virt` does not have.

use std::ffi::{CStr, CString, c_int, c_uint};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{null, null_mut};

use virt::domain::Domain;
use virt::error::Error;
use virt::sys;

/// virDomainQemuMonitorCommandWithFiles (libvirt 8.2), with one descriptor.
pub(super) fn command_with_file(
    domain: &Domain,
    command: &str,
    fd: BorrowedFd<'_>,
) -> Result<String, Error> {
    let command = CString::new(command)?;
    let mut files: [c_int; 1] = [fd.as_raw_fd()];
    let mut answer = null_mut();
    // SAFETY: the domain, the command and the descriptor live until the call returns. libvirt
    // reads as many descriptors as it is told, and writes the address of a string that is ours
    // to free. No descriptors are asked back.
    done(unsafe {
        sys::virDomainQemuMonitorCommandWithFiles(
            domain.as_ptr(),
            command.as_ptr(),
            files.len() as c_uint,
            files.as_mut_ptr(),
            null_mut(),
            null_mut(),
            &mut answer,
            0,
        )
    })?;
    // SAFETY: libvirt has set it to a string, made by malloc(3), which nobody else uses.
    let text = unsafe { CStr::from_ptr(answer) }.to_string_lossy().into_owned();
    // SAFETY: as above; it is not used any more.
    unsafe { libc::free(answer.cast()) };
    Ok(text)
}

/// virDomainSaveFlags: the domain goes to a file, with this definition, and will run again.
pub(super) fn save(domain: &Domain, file: &str, xml: &str) -> Result<(), Error> {
    let (file, xml) = (CString::new(file)?, CString::new(xml)?);
    let running = sys::VIR_DOMAIN_SAVE_RUNNING;
    // SAFETY: the domain and both strings live until the call returns.
    done(unsafe { sys::virDomainSaveFlags(domain.as_ptr(), file.as_ptr(), xml.as_ptr(), running) })
        .map(drop)
}

/// virDomainFSFreeze of all file systems. Returns how many they are.
pub(super) fn freeze(domain: &Domain) -> Result<u64, Error> {
    // SAFETY: the domain is alive; no mount points means all.
    let frozen = done(unsafe { sys::virDomainFSFreeze(domain.as_ptr(), null_mut(), 0, 0) })?;
    Ok(frozen.unsigned_abs().into())
}

/// virDomainFSThaw of all file systems.
pub(super) fn thaw(domain: &Domain) -> Result<(), Error> {
    // SAFETY: as for `freeze`.
    done(unsafe { sys::virDomainFSThaw(domain.as_ptr(), null_mut(), 0, 0) }).map(drop)
}

/// virDomainBlockCommit of a disk's topmost file into the one below it.
pub(super) fn begin_commit(domain: &Domain, target: &str) -> Result<(), Error> {
    let target = CString::new(target)?;
    let flags = sys::VIR_DOMAIN_BLOCK_COMMIT_ACTIVE | sys::VIR_DOMAIN_BLOCK_COMMIT_SHALLOW;
    // SAFETY: domain and name live until the call returns; no base and no top mean those that
    // the flags say.
    done(unsafe {
        sys::virDomainBlockCommit(domain.as_ptr(), target.as_ptr(), null(), null(), 0, flags)
    })
    .map(drop)
}

/// virDomainGetBlockJobInfo: how much of a disk's job is done, and how much there is to do; none
/// without a job.
pub(super) fn block_job(domain: &Domain, target: &str) -> Result<Option<(u64, u64)>, Error> {
    let target = CString::new(target)?;
    let mut info = sys::virDomainBlockJobInfo { type_: 0, bandwidth: 0, cur: 0, end: 0 };
    // SAFETY: domain, name and the place for the answer live until the call returns.
    let found = done(unsafe {
        sys::virDomainGetBlockJobInfo(domain.as_ptr(), target.as_ptr(), &mut info, 0)
    })?;
    Ok((found > 0).then_some((info.cur, info.end)))
}

/// virDomainBlockJobAbort with a pivot: the job is over, and the disk is the file that it has
/// written to.
pub(super) fn pivot(domain: &Domain, target: &str) -> Result<(), Error> {
    let target = CString::new(target)?;
    let flags = sys::VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT;
    // SAFETY: domain and name live until the call returns.
    done(unsafe { sys::virDomainBlockJobAbort(domain.as_ptr(), target.as_ptr(), flags) }).map(drop)
}

/// What a call returned, which is negative if it failed.
fn done(returned: c_int) -> Result<c_int, Error> {
    match returned {
        ..0 => Err(Error::last_error()),
        returned => Ok(returned),
    }
}
