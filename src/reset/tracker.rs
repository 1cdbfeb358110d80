//! Tracks a guest's writes, and undoes them.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::watch;

use super::ResetError;
use super::compare::compare;
use super::dirty::DirtyPage;
use super::memory::{GuestMemory, Unit};
use super::shared::Shared;
use super::write_back::write_back;
use crate::host::uffd::{Fault, FaultBuffer, Uffd};
use crate::page::{PAGE_SIZE, PageBytes};

/// The most host pages that are expected to be written when devices are loaded: some dozens are, of
/// firmware and tables.
const MOST_EXPECTED: usize = 1024;

/// Tracks a guest's writes from its start on. Dropping it ends that, and the guest runs on.
pub(crate) struct Tracker {
    shared: Arc<Shared>,
    wake: Arc<EventFd>,
    compared: watch::Receiver<Option<Result<(), String>>>,
    /// The host pages that QEMU has written when it loaded the devices last.
    written_by_loading: Mutex<Vec<Unit>>,
    /// None once it has been waited for.
    faults: Mutex<Option<JoinHandle<()>>>,
    /// Not waited for: it ends by itself, soon after the tracking has.
    _compare: JoinHandle<()>,
}

impl Tracker {
    /// Begins to track the writes of a guest that has all its memory, and to look in the
    /// background for what it has written so far.
    ///
    /// `uffd` must be QEMU's, and QEMU must have let go of it: it stays registered with all of the
    /// guest's memory until this is dropped.
    ///
    /// # Errors
    /// When memory can't be write-protected, or a thread not be started. Nothing is protected
    /// then.
    pub fn start(guest: GuestMemory, uffd: Arc<Uffd>) -> Result<Tracker, ResetError> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| ResetError::Thread(errno.into()))?;
        let wake = Arc::new(wake);
        let shared = Arc::new(Shared::new(guest, uffd));
        // Ahead of the first protection, so that nobody waits in vain.
        let faults = spawn("tracking", {
            let (shared, wake) = (Arc::clone(&shared), Arc::clone(&wake));
            move || {
                if let Err(error) = answer_faults(&shared, &wake)
                    && !shared.guest.has_ended()
                {
                    tracing::error!("the guest's writes are tracked no more: {error}");
                }
                shared.let_go();
            }
        })?;
        let (tell, compared) = watch::channel(None);
        let protected = shared.guest.ranges().try_for_each(|range| {
            shared.uffd.register_for_tracking(range.start, range.end - range.start)?;
            shared.uffd.protect(range.start, range.end - range.start)
        });
        let compare = protected.map_err(ResetError::from).and_then(|()| {
            let shared = Arc::clone(&shared);
            spawn("compare", move || {
                let compared = compare(&shared).map_err(|error| error.to_string());
                tell.send_replace(Some(compared));
            })
        });
        match compare {
            Ok(_compare) => {
                let faults = Mutex::new(Some(faults));
                let written_by_loading = Mutex::default();
                Ok(Tracker { shared, wake, compared, written_by_loading, faults, _compare })
            }
            Err(error) => {
                end(&wake, faults);
                Err(error)
            }
        }
    }

    /// Waits until it is known what the guest had written before its writes were tracked.
    ///
    /// # Errors
    /// When the image or the guest's memory can't be read.
    pub async fn ready(&self) -> Result<(), ResetError> {
        let gone = || ResetError::Thread(std::io::ErrorKind::BrokenPipe.into());
        let mut compared = self.compared.clone();
        let told = compared.wait_for(Option::is_some).await.map_err(|_| gone())?;
        match &*told {
            Some(Ok(())) if !self.shared.has_ended() => Ok(()),
            Some(Err(error)) => Err(ResetError::Obstacle(error.clone())),
            _ => Err(gone()),
        }
    }

    /// Waits until nothing is tracked any more.
    pub async fn ended(&self) {
        let mut ended = self.shared.ending();
        let _ = ended.wait_for(|ended| *ended).await;
    }

    /// Has all memory be what it was at the moment of the image. Returns how many host pages were
    /// written back. It blocks; the guest must stand still, and QEMU is about to load its devices.
    ///
    /// # Errors
    /// When memory can't be read or written. Some of it is then what it was, and some is not.
    pub fn restore(&self) -> Result<u64, ResetError> {
        let count = self.write_back(|_| {})?;
        // Each of these would cost a fault, while everybody waits for QEMU.
        for unit in self.written_by_loading().iter() {
            expect_write(&self.shared, *unit)?;
        }
        Ok(count)
    }

    /// The same behind the loading, which has written to some memory.
    ///
    /// # Errors
    /// As for [`Tracker::restore`].
    pub fn restore_again(&self) -> Result<u64, ResetError> {
        self.write_back(|pages| {
            let unit = |page: &DirtyPage| self.shared.guest.unit(page.block, page.unit);
            let mut written = self.written_by_loading();
            written.clear();
            written.extend(pages.iter().take(MOST_EXPECTED).map(unit));
        })
    }

    /// Writes back all that was written, and tracks what is from then on.
    fn write_back(&self, seen: impl FnOnce(&[DirtyPage])) -> Result<u64, ResetError> {
        let shared = &*self.shared;
        let (pages, aside) = shared.log().take();
        seen(&pages);
        let written = write_back(shared, &pages, &aside);
        let count = pages.len() as u64;
        shared.log().give_back(pages, aside);
        written.map(|()| count)
    }

    fn written_by_loading(&self) -> MutexGuard<'_, Vec<Unit>> {
        self.written_by_loading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tracks no more, and takes all protection off. The guest runs on.
    pub fn end(&self) {
        let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(faults) = faults {
            end(&self.wake, faults);
        }
    }

    /// How many host pages were written since the last reset.
    pub fn written(&self) -> u64 {
        self.shared.log().len() as u64
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        self.end();
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, ResetError> {
    std::thread::Builder::new().name(name.into()).spawn(body).map_err(ResetError::Thread)
}

/// Ends the thread that answers faults.
fn end(wake: &EventFd, faults: JoinHandle<()>) {
    // It fails only when the counter is full, and then it is readable as well.
    let _ = wake.write(1);
    let _ = faults.join();
}

/// Answers faults until it is woken to end, or the guest has ended.
fn answer_faults(shared: &Shared, wake: &EventFd) -> Result<(), ResetError> {
    let mut buffer = FaultBuffer::default();
    let broken = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
    loop {
        let mut fds = [
            PollFd::new(shared.uffd.as_fd(), PollFlags::POLLIN),
            PollFd::new(wake.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(ResetError::Thread(errno.into())),
        }
        let seen = |at: usize| fds[at].revents().unwrap_or(PollFlags::empty());
        if seen(1).intersects(PollFlags::POLLIN) || seen(0).intersects(broken) {
            return Ok(());
        }
        for fault in shared.uffd.read_faults(&mut buffer)? {
            answer(shared, fault)?;
        }
    }
}

/// Notes what a thread is about to change, and lets it go on.
fn answer(shared: &Shared, fault: Fault) -> Result<(), ResetError> {
    let Shared { guest, uffd, .. } = shared;
    let Some(unit) = guest.find(fault.address) else {
        // Not memory of the guest's: nothing of it is protected.
        let page = fault.address & !(PAGE_SIZE as u64 - 1);
        return Ok(uffd.wake(page, PAGE_SIZE as u64)?);
    };
    if !fault.protected {
        // Never used, or given back by the guest: the kernel would give zeros. What belongs there
        // is the image's to tell.
        note(shared, unit, None)?;
        return zero(shared, unit);
    }
    let is_the_images = unit.number < shared.compared[unit.block.index()].load(Ordering::Acquire);
    // Read ahead of the lock. A page that is missing would be waited for, and by whom if not us: it
    // can be only where the guest has given it back and writes to it all the same, since every
    // write to what is missing comes as another kind of fault.
    let may_be_missing = !is_the_images || !guest.is_present(unit);
    note_and_unprotect(shared, unit, !may_be_missing)
}

/// Notes a page that is about to be written ahead of the fault. Nobody writes there now.
fn expect_write(shared: &Shared, unit: Unit) -> Result<(), ResetError> {
    note_and_unprotect(shared, unit, shared.guest.is_present(unit))
}

/// Notes that a page is about to be written, with what is in it unless the image is to be asked for
/// that, and lets it be written.
fn note_and_unprotect(shared: &Shared, unit: Unit, set_aside: bool) -> Result<(), ResetError> {
    let mut bytes = [0; PAGE_SIZE];
    let old = match set_aside && unit.len == PAGE_SIZE as u64 {
        true => shared.guest.read(unit.address, &mut bytes).map(|()| Some(&bytes))?,
        false => None,
    };
    note(shared, unit, old)?;
    Ok(shared.uffd.unprotect(unit.address, unit.len)?)
}

/// Notes that a page is about to be written, with what is in it where the image need not be
/// asked.
fn note(shared: &Shared, unit: Unit, old: Option<&PageBytes>) -> Result<(), ResetError> {
    let copy = old.map(|old| {
        move |room: &mut PageBytes| {
            room.copy_from_slice(old);
            Ok::<(), ResetError>(())
        }
    });
    shared.log().add(unit.block, unit.number, copy)
}

/// Installs zeros where memory is missing.
fn zero(shared: &Shared, unit: Unit) -> Result<(), ResetError> {
    let Shared { uffd, .. } = shared;
    // SAFETY: the host page is the guest's, and as long as that. What is there already is left as
    // it is.
    let installed = unsafe {
        match unit.len == PAGE_SIZE as u64 {
            true => uffd.zero(unit.address, unit.len, unit.len),
            // There is no zero page of the size of hugetlbfs's.
            false => uffd.copy(unit.address, &vec![0; unit.len as usize], unit.len),
        }
    };
    Ok(installed?)
}
