//! All pools of a daemon.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, broadcast};
use tokio::task::{JoinSet, spawn_blocking};

use super::config::{Change, PoolConfig, PoolSettings, check_name};
use super::error::PoolError;
use super::event::{GuestView, PoolEvent, PoolView, ResetView};
use super::figures::Figures;
use super::handle::Handle;
use super::images::Images;
use super::options::PoolsOptions;
use super::pool::{Pool, Shared};
use super::saved::{Numbers, SavedGuest, StateDirectory};
use super::stage::Adopted;
use crate::host::pidfd::{Pidfd, peer_pid};
use crate::runs::{self, ProcessId};

/// How many events whoever listens may be behind.
const EVENTS: usize = 1024;

/// How long a daemon that has been told to end may hold its state, and how often it is looked.
const ENDING: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_millis(20);

/// How long a request for a guest waits, by default.
const PATIENCE: Duration = Duration::from_secs(30);

/// A request for a guest.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Take {
    /// The name that the guest is to have.
    pub name: Option<String>,
    /// How long it waits for its turn.
    pub patience: Duration,
    /// When it came.
    pub began: Instant,
}

impl Default for Take {
    /// One that comes now.
    fn default() -> Take {
        Take { name: None, patience: PATIENCE, began: Instant::now() }
    }
}

/// All pools of a daemon.
pub struct Pools {
    pools: Mutex<BTreeMap<String, Arc<Pool>>>,
    /// Those that a configuration file has, which no request changes for good.
    configured: BTreeMap<String, PoolSettings>,
    shared: Shared,
}

impl Pools {
    /// Takes the directory of the state, and starts the pools that are `configured` and those that
    /// were created by request. Guests that a daemon before this one has handed out are taken up;
    /// what is left of others is removed.
    ///
    /// # Errors
    /// When another daemon uses the directory, or it can't be used, or a configured pool can't be.
    pub async fn start(
        options: PoolsOptions,
        configured: BTreeMap<String, PoolSettings>,
    ) -> Result<Pools, PoolError> {
        for (name, settings) in &configured {
            check(name, settings)?;
        }
        let state = Arc::new(take(&options.state).await?);
        let shared = Shared {
            state: Arc::clone(&state),
            keeper: options.keeper,
            address: options.address,
            images: Arc::new(Images::new(options.cache)),
            arming: Arc::new(Semaphore::new(options.arming.max(1))),
            events: broadcast::channel(EVENTS).0,
            numbers: Arc::new(Numbers::read(Arc::clone(&state))?),
        };
        let mut all = state.pools()?;
        all.extend(configured.clone());
        let pools = Pools { pools: Mutex::default(), configured, shared };
        let guests = state.guests()?;
        // Guests that nobody takes up must have let go of names and ports.
        let known = |guest: &SavedGuest| guest.taken && all.contains_key(&guest.pool);
        let (taken, others): (Vec<_>, Vec<_>) = guests.into_iter().partition(known);
        let others = others.into_iter().map(|guest| {
            let state = Arc::clone(&state);
            async move { discard(&state, guest).await }
        });
        // Each waits for a QEMU to end.
        others.collect::<JoinSet<()>>().join_all().await;
        let mut started = BTreeMap::new();
        for (name, settings) in all {
            started.insert(name.clone(), Pool::start(&name, settings, pools.shared.clone()));
        }
        for guest in taken {
            let pool = &started[&guest.pool];
            match guest.resetting {
                true => {
                    discard(&state, guest.clone()).await;
                    pool.adopt_resetting(&guest);
                }
                false => pool.adopt(&guest),
            }
            if !pool.has(&guest.id) {
                discard(&state, guest).await;
            }
        }
        *pools.all() = started;
        Ok(pools)
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Pool>>> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pool(&self, name: &str) -> Result<Arc<Pool>, PoolError> {
        let pool = self.all().get(name).cloned();
        pool.ok_or_else(|| PoolError::NoSuchPool { name: name.to_owned() })
    }

    /// What happens from now on.
    pub fn events(&self) -> broadcast::Receiver<PoolEvent> {
        self.shared.events.subscribe()
    }

    /// All pools, by name.
    pub fn list(&self) -> Vec<PoolView> {
        let pools: Vec<_> = self.all().values().cloned().collect();
        pools.iter().map(|pool| pool.measured()).collect()
    }

    /// What has been counted of each pool.
    pub fn figures(&self) -> Vec<(PoolView, Figures)> {
        let pools: Vec<_> = self.all().values().cloned().collect();
        pools.iter().map(|pool| (pool.measured(), pool.figures())).collect()
    }

    /// One pool.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn get(&self, name: &str) -> Result<PoolView, PoolError> {
        Ok(self.pool(name)?.measured())
    }

    /// Creates a pool, which fills from now on.
    ///
    /// # Errors
    /// When there is one of that name, or it can't be.
    pub fn create(&self, config: PoolConfig) -> Result<PoolView, PoolError> {
        let PoolConfig { name, settings } = config;
        check(&name, &settings)?;
        let mut all = self.all();
        if all.contains_key(&name) {
            return Err(PoolError::Exists { what: "a pool", name });
        }
        let pool = Pool::start(&name, settings, self.shared.clone());
        let view = pool.view();
        all.insert(name.clone(), Arc::clone(&pool));
        if let Err(error) = self.write_down(&all) {
            all.remove(&name);
            drop(all);
            tokio::spawn(async move { pool.remove().await });
            return Err(error);
        }
        Ok(view)
    }

    /// Changes a pool, until the daemon ends where its configuration has the pool.
    ///
    /// # Errors
    /// When there is none of that name, or it can't be.
    pub async fn change(&self, name: &str, change: &Change) -> Result<PoolView, PoolError> {
        let pool = self.pool(name)?;
        pool.change(change).await?;
        self.write_down(&self.all())?;
        Ok(pool.view())
    }

    /// Removes a pool with all its guests.
    ///
    /// # Errors
    /// When there is none of that name.
    pub async fn remove(&self, name: &str) -> Result<(), PoolError> {
        let pool = {
            let mut all = self.all();
            let pool = all.remove(name);
            self.write_down(&all)?;
            pool.ok_or_else(|| PoolError::NoSuchPool { name: name.to_owned() })?
        };
        pool.remove().await;
        Ok(())
    }

    /// Takes a guest of a pool, which runs when this returns.
    ///
    /// # Errors
    /// When none is to be had in time, or it can't be brought to run.
    pub async fn take(&self, pool: &str, take: Take) -> Result<GuestView, PoolError> {
        let Take { name, patience, began } = take;
        self.pool(pool)?.take(began, name, patience).await
    }

    /// All guests that are taken.
    pub fn guests(&self) -> Vec<GuestView> {
        let pools: Vec<_> = self.all().values().cloned().collect();
        let guests = pools.iter().flat_map(|pool| {
            pool.taken().into_iter().map(|guest| pool.view_of(&guest)).collect::<Vec<_>>()
        });
        guests.collect()
    }

    /// The guest of this id or name.
    fn find(&self, id: &str) -> Result<(Arc<Pool>, Arc<Handle>), PoolError> {
        let pools: Vec<_> = self.all().values().cloned().collect();
        let all = || {
            pools.iter().flat_map(|pool| {
                pool.taken().into_iter().map(move |guest| (Arc::clone(pool), guest))
            })
        };
        let by_id = all().find(|(_, guest)| guest.place.id == id);
        let found = by_id.or_else(|| all().find(|(_, guest)| guest.name() == id));
        found.ok_or_else(|| PoolError::NoSuchGuest { id: id.to_owned() })
    }

    /// A guest that is taken, by its id or name.
    ///
    /// # Errors
    /// When there is none.
    pub fn guest(&self, id: &str) -> Result<GuestView, PoolError> {
        let (pool, guest) = self.find(id)?;
        Ok(pool.view_of(&guest))
    }

    /// Takes a guest back to its image.
    ///
    /// # Errors
    /// When there is none of that id or name, or it could not be started anew; it is no more then.
    pub async fn reset(&self, id: &str) -> Result<ResetView, PoolError> {
        let (pool, guest) = self.find(id)?;
        pool.reset(&guest).await
    }

    /// Ends a guest. Its directory is removed.
    ///
    /// # Errors
    /// When there is none of that id or name.
    pub async fn release(&self, id: &str) -> Result<(), PoolError> {
        let (pool, guest) = self.find(id)?;
        pool.release(&guest).await;
        Ok(())
    }

    /// Ends all guests that wait. Those that were taken go on: a daemon that comes after takes them
    /// up.
    pub async fn end_waiting(&self) {
        let pools: Vec<_> = self.all().values().cloned().collect();
        for pool in pools {
            pool.end_waiting().await;
        }
    }

    /// Writes down the pools that were created by request.
    fn write_down(&self, all: &BTreeMap<String, Arc<Pool>>) -> Result<(), PoolError> {
        let by_request = all.iter().filter(|(name, _)| !self.configured.contains_key(*name));
        let pools = by_request.map(|(name, pool)| (name.clone(), pool.settings())).collect();
        self.shared.state.set_pools(&pools)
    }
}

fn check(name: &str, settings: &PoolSettings) -> Result<(), PoolError> {
    check_name(name)?;
    settings.check()
}

/// Takes the directory of the state. The daemon before this one may be about to end.
async fn take(path: &Path) -> Result<StateDirectory, PoolError> {
    let until = Instant::now() + ENDING;
    loop {
        match StateDirectory::take(path) {
            Err(PoolError::DaemonRunning { .. }) if Instant::now() < until => {
                tokio::time::sleep(AGAIN).await;
            }
            taken => return taken,
        }
    }
}

/// Ends what is left of a guest that nobody goes on with, and removes its files.
async fn discard(state: &Arc<StateDirectory>, guest: SavedGuest) {
    let state = Arc::clone(state);
    let discarded = spawn_blocking(move || {
        // Its daemon may have been killed before it had noted which process it had started; its
        // record or its socket may know.
        let recorded = runs::find(&guest.id).ok().and_then(|run| run.qemu_pid);
        let known = guest.qemu.and_then(ProcessId::living);
        let listens = || peer_pid(&UnixStream::connect(&guest.qmp).ok()?);
        let process = known.or(recorded).or_else(listens).map(Pidfd::open);
        if let Some(Ok(qemu)) = process {
            drop(Adopted { id: guest.id.clone(), qemu: Arc::new(qemu) });
        }
        let _ = std::fs::remove_dir_all(&guest.directory);
        state.forget(&guest.id);
    });
    let _ = discarded.await;
}
