//! What each guest of a pool is given.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::task::spawn_blocking;

use super::config::PoolSettings;
use super::images::{Images, PoolImage};
use super::saved::StateDirectory;
use crate::guest::{NewPort, RewriteOptions};
use crate::image::ImageError;
use crate::keeper::Successor;
use crate::memory::{CacheFigures, FillDelay};
use crate::revert::{AgentOptions, CloneIdentity, Delivery, Placement, RevertOptions};
use crate::runs::{OfPool, RunOptions};

/// The name of a guest's control socket in its directory.
const QMP: &str = "qmp.sock";

/// The file of what a keeper, and servers that follow the daemon, have to say.
const LOG: &str = "server.log";

/// How often a guest's progress is told: seldom, since nobody shows it.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// A pool's image, and what its guests are called and given.
pub(super) struct Template {
    state: Arc<StateDirectory>,
    images: Arc<Images>,
    /// Once it could be opened.
    image: OnceLock<Arc<PoolImage>>,
    settings: PoolSettings,
    name: String,
    directory: String,
    keeper: Option<Successor>,
    of: OfPool,
}

/// One guest of a pool: what tells it from all others.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// Its id, of its record as well.
    pub id: String,
    pub identity: CloneIdentity,
    /// Ports that it has to have, as another QEMU of it had before.
    pub ports: BTreeMap<u16, u16>,
}

/// What is done for a guest as soon as it runs.
#[derive(Debug, Clone, Default)]
pub(super) struct Setup {
    pub agent: AgentOptions,
    /// A command of the host's shell.
    pub hook: Option<String>,
}

impl Template {
    /// That of a pool. Nothing is opened yet.
    pub fn new(
        of: OfPool,
        settings: &PoolSettings,
        images: Arc<Images>,
        state: Arc<StateDirectory>,
        keeper: Option<Successor>,
    ) -> Template {
        let base = state.of_pool(&of.name);
        let name = settings.guest_name.clone().unwrap_or_else(|| format!("{}-{{n}}", of.name));
        let own = || base.join("{name}").to_string_lossy().into_owned();
        let directory = settings.dir.clone().unwrap_or_else(own);
        let (image, settings) = (OnceLock::new(), settings.clone());
        Template { state, images, image, settings, name, directory, keeper, of }
    }

    /// The pool's image: opened, and copied where memory is to be shared, the first time.
    pub async fn image(&self) -> Result<Arc<PoolImage>, ImageError> {
        if let Some(image) = self.image.get() {
            return Ok(Arc::clone(image));
        }
        let (images, state) = (Arc::clone(&self.images), Arc::clone(&self.state));
        let settings = self.settings.clone();
        let opened = spawn_blocking(move || images.of(&settings, &state)).await;
        let image = opened.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))?;
        Ok(Arc::clone(self.image.get_or_init(|| image)))
    }

    /// The memory of the image's machine, in bytes.
    pub async fn ram(&self) -> Result<u64, ImageError> {
        Ok(self.image().await?.ram())
    }

    /// What the cache of its image has come to, once that is open.
    pub fn cache(&self) -> Option<CacheFigures> {
        self.image.get().map(|image| image.cache())
    }

    /// What the guest of this number is called.
    pub fn identity(&self, number: u32) -> CloneIdentity {
        CloneIdentity::new(number, &self.name, &self.directory)
    }

    /// How a guest is brought back and held.
    pub fn options(&self, place: &Place) -> RevertOptions {
        let PoolSettings { preload, share, .. } = self.settings;
        let identity = &place.identity;
        let expand = |text: &String| identity.expand(text);
        let pair = |(old, new): (&String, &String)| (expand(old), expand(new));
        let mut rewrite = RewriteOptions {
            qemu: self.settings.qemu.clone(),
            qmp: Some(self.qmp(identity)),
            paths: self.settings.paths.iter().map(pair).collect(),
            netdevs: self.settings.netdevs.iter().map(pair).collect(),
            extra: self.settings.arguments.iter().map(expand).collect(),
            ports: self.ports(place),
            own: Some(identity.directory.clone()),
            new_generation: self.settings.new_generation,
            ..RewriteOptions::default()
        };
        // What a guest has written ends with it.
        rewrite.overlays.directory = Some(identity.directory.clone());
        let delivery = Delivery {
            placement: if share { Placement::Map } else { Placement::Auto },
            fill_rate: self.settings.fill_rate,
            fill_delay: self
                .settings
                .fill_delay_ms
                .map(Duration::from_millis)
                .map(FillDelay::Quiet),
            // Most guests of a pool live shorter than huge pages would take to pay.
            collapse: false,
            progress_every: PROGRESS_EVERY,
            ..Delivery::default()
        };
        let log = identity.directory.join(LOG);
        let (id, pool) = (place.id.clone(), Some(self.of.clone()));
        let run = RunOptions { id, pool, ..RunOptions::new() };
        RevertOptions {
            rewrite,
            delivery,
            preload,
            standby: true,
            resettable: self.is_resettable(),
            agent: self.setup(identity).agent,
            keeper: self.keeper.clone().map(|keeper| keeper.logging_to(log)),
            run: Some(run),
            ..RevertOptions::new(self.settings.image.clone())
        }
    }

    /// What is done for this guest as soon as it runs.
    pub fn setup(&self, identity: &CloneIdentity) -> Setup {
        let PoolSettings { new_macs, agent_set_time: set_time, .. } = self.settings;
        let PoolSettings { agent, agent_exec, hook_running, .. } = &self.settings;
        let agent = AgentOptions {
            socket: agent.as_ref().map(|path| identity.expand(path).into()),
            new_macs,
            set_time,
            commands: agent_exec.iter().map(|command| identity.expand(command)).collect(),
        };
        Setup { agent, hook: hook_running.clone() }
    }

    /// Whether anything is done for a guest as soon as it runs.
    pub fn has_setup(&self) -> bool {
        self.settings.hook_running.is_some()
            || self.settings.agent_set_time
            || self.settings.new_macs
            || !self.settings.agent_exec.is_empty()
    }

    /// Whether a guest's network cards get new addresses.
    pub fn gives_new_macs(&self) -> bool {
        self.settings.new_macs
    }

    /// Whether a guest is to be reset inside its QEMU.
    pub fn is_resettable(&self) -> bool {
        self.settings.resettable
    }

    /// A guest's control socket.
    pub fn qmp(&self, identity: &CloneIdentity) -> PathBuf {
        identity.directory.join(QMP)
    }

    fn ports(&self, place: &Place) -> Vec<(u16, NewPort)> {
        let mut ports: BTreeMap<u16, NewPort> = BTreeMap::new();
        for (old, new) in &self.settings.ports {
            // `PoolSettings::check` lets numbers through only.
            let Ok(old) = old.parse() else { continue };
            ports.insert(old, if *new == 0 { NewPort::Free } else { NewPort::Number(*new) });
        }
        ports.extend(place.ports.iter().map(|(old, new)| (*old, NewPort::Number(*new))));
        ports.into_iter().collect()
    }
}
