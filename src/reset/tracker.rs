//! Tracks a guest's writes, and undoes them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use tokio::sync::watch;

use super::ResetError;
use super::compare::compare;
use super::faults::{FaultThread, expect, gone};
use super::given_back::find_given_back;
use super::memory::{GuestMemory, Unit};
use super::requests::Tracked;
use super::shared::Shared;
use super::write_back::write_back;
use crate::cancel::Cancellation;
use crate::host::uffd::Uffd;
use crate::memory::FaultReader;

/// The most host pages that a guest is expected to write again: 32 MiB.
const MOST_EXPECTED: usize = 8192;

/// Host pages that are expected to be written.
#[derive(Default)]
struct Expected {
    /// What the guest has written ahead of the last reset.
    of_guest: Vec<Unit>,
    /// What QEMU has written when it loaded the devices last: some dozens, of firmware and tables.
    of_loading: Vec<Unit>,
}

/// Tracks a guest's writes from its start on. Dropping it ends that, and the guest runs on.
pub(crate) struct Tracker {
    shared: Arc<Shared>,
    /// Ends the thread that answers faults.
    cancel: Cancellation,
    compared: watch::Receiver<Option<Result<(), String>>>,
    expected: Mutex<Expected>,
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
        let cancel = Cancellation::new();
        let reader = FaultReader::new(Arc::clone(&uffd), &cancel).map_err(gone)?;
        let shared = Arc::new(Shared::new(guest, uffd));
        let protected = shared.guest.ranges().try_for_each(|range| {
            shared.uffd.register_for_tracking(range.start, range.end - range.start)?;
            shared.uffd.protect(range.start, range.end - range.start)
        });
        if let Err(error) = protected {
            shared.let_go();
            return Err(error.into());
        }
        // Behind the protection. Faults of a guest that waited for QEMU may still be told, although
        // QEMU has let go of its memory: what is not registered can't be let be written.
        let faults = spawn("tracking", {
            let shared = Arc::clone(&shared);
            move || {
                if let Err(error) = FaultThread::new(&shared, reader).run()
                    && !shared.guest.has_ended()
                {
                    tracing::error!("the guest's writes are tracked no more: {error}");
                }
                shared.let_go();
            }
        })
        .inspect_err(|_| shared.let_go())?;
        let (tell, compared) = watch::channel(None);
        let compare = spawn("compare", {
            let shared = Arc::clone(&shared);
            move || {
                let compared = compare(&shared).map_err(|error| error.to_string());
                tell.send_replace(Some(compared));
            }
        });
        match compare {
            Ok(_compare) => {
                let faults = Mutex::new(Some(faults));
                let expected = Mutex::default();
                Ok(Tracker { shared, cancel, compared, expected, faults, _compare })
            }
            Err(error) => {
                end(&cancel, faults);
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

    /// Has all memory be what it was at the moment of the image. Returns how many host pages had
    /// been written. It blocks; the guest must stand still, and QEMU is about to load its devices.
    ///
    /// # Errors
    /// When memory can't be read or written. Some of it is then what it was, and some is not.
    pub fn restore(&self) -> Result<u64, ResetError> {
        let written = self.write_back()?;
        let count = written.len() as u64;
        let mut expected = self.expected();
        expected.of_guest = written;
        expected.of_guest.truncate(MOST_EXPECTED);
        // Each of these would cost a fault, while everybody waits for QEMU.
        expected.of_loading.iter().try_for_each(|unit| expect(&self.shared, *unit))?;
        Ok(count)
    }

    /// The same behind the loading, which has written to some memory.
    ///
    /// # Errors
    /// As for [`Tracker::restore`].
    pub fn restore_again(&self) -> Result<u64, ResetError> {
        let written = self.write_back()?;
        let count = written.len() as u64;
        self.expected().of_loading = written;
        Ok(count)
    }

    /// Notes memory that the guest has given back to the host: it is missing, although the image
    /// has something for it. Returns how many host pages that are. It blocks; the guest must
    /// stand still.
    ///
    /// # Errors
    /// When it can't be looked for.
    pub fn find_given_back(&self) -> Result<u64, ResetError> {
        find_given_back(&self.shared)
    }

    /// Has the guest write without a fault what it has written ahead of the last reset: whoever is
    /// reset again and again mostly does the same again. It may run. Returns how many pages are
    /// expected.
    ///
    /// # Errors
    /// When memory can't be read.
    pub fn expect_the_same(&self) -> Result<u64, ResetError> {
        let expected = self.expected();
        expected.of_guest.iter().try_for_each(|unit| expect(&self.shared, *unit))?;
        Ok(expected.of_guest.len() as u64)
    }

    /// Writes back all that was written, and tracks what is from then on. Returns which pages had
    /// been written.
    fn write_back(&self) -> Result<Vec<Unit>, ResetError> {
        let shared = &*self.shared;
        let (pages, aside) = shared.log().take();
        let written = write_back(shared, &pages, &aside);
        shared.log().give_back(pages, aside);
        written
    }

    fn expected(&self) -> MutexGuard<'_, Expected> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tracks no more, and takes all protection off. The guest runs on.
    pub fn end(&self) {
        let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(faults) = faults {
            end(&self.cancel, faults);
        }
    }

    /// What is tracked. Once that is [ready](Tracker::ready), all that is protected is what the image
    /// has: what differed has been let be written.
    pub fn tracked(&self) -> Tracked {
        self.shared.guest.tracked()
    }

    /// How many host pages were written since the last reset, or are expected to be.
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
fn end(cancel: &Cancellation, faults: JoinHandle<()>) {
    cancel.request();
    let _ = faults.join();
}
