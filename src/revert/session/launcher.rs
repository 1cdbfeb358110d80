//! Who starts QEMU for a session: we, or libvirt in our place.

use std::path::Path;

use super::qemu::Qemu;
use crate::cancel::Cancellation;
use crate::guest::{Note, Overlay, OverlayOptions, Process, RewriteOptions, StartPlan};
use crate::image::Image;
use crate::libvirt::{DomainAddress, DomainPlan, StartedDomain};
use crate::revert::error::RevertError;
use crate::revert::mapping;
use crate::revert::options::RevertOptions;
use crate::runs::Record;

/// A start that is planned.
pub(super) enum Launcher {
    /// Of a process of ours.
    Process(Box<StartPlan>),
    /// Of a domain of libvirt's.
    Domain(Box<DomainPlan>),
}

impl Launcher {
    /// Plans the start of an image's guest. It stays `paused` where we have to say when it runs.
    /// Returns also why a flat image is not mapped, where that was left to us.
    pub fn plan(
        image: &Image,
        options: &RevertOptions,
        paused: bool,
    ) -> Result<(Launcher, Option<String>), RevertError> {
        let RevertOptions { rewrite, domain, .. } = options;
        let Some(domain) = domain else {
            let overlays = placed(options);
            let rewriting = RewriteOptions { paused, overlays, ..rewrite.clone() };
            let (plan, not_mapped) = mapping::plan(image, options, rewriting)?;
            return Ok((Launcher::Process(Box::new(plan)), not_mapped));
        };
        let (memory, not_mapped) = mapping::for_domain(image, options)?;
        let path = std::path::absolute(&options.image).unwrap_or_else(|_| options.image.clone());
        let machine = &image.manifest().machine;
        let plan = DomainPlan::new(machine, &path, domain, rewrite, memory.as_ref())?;
        if memory.is_some() {
            let mapped: Vec<&str> = plan.mapped.iter().map(|(block, _)| block.as_str()).collect();
            mapping::check_left(image, &mapped)?;
        }
        Ok((Launcher::Domain(Box::new(plan)), not_mapped))
    }

    /// Whether QEMU waits to be told before it runs the guest.
    pub fn is_paused(&self) -> bool {
        match self {
            Launcher::Process(plan) => plan.paused,
            // libvirt says when.
            Launcher::Domain(_) => true,
        }
    }

    /// The socket of its agent's channel, where we start it.
    pub fn agent(&self) -> Option<&Path> {
        match self {
            Launcher::Process(plan) => plan.reach.agent.as_deref(),
            Launcher::Domain(_) => None,
        }
    }

    /// What differs from the record.
    pub fn notes(&self) -> &[Note] {
        match self {
            Launcher::Process(plan) => &plan.notes,
            Launcher::Domain(plan) => &plan.notes,
        }
    }

    /// The overlays that are created.
    pub fn overlays(&self) -> &[Overlay] {
        match self {
            Launcher::Process(plan) => &plan.overlays,
            Launcher::Domain(plan) => &plan.overlays,
        }
    }

    /// The domain that it will be.
    pub fn domain(&self) -> Option<DomainAddress> {
        match self {
            Launcher::Process(_) => None,
            Launcher::Domain(plan) => Some(plan.domain()),
        }
    }

    /// The blocks that QEMU maps from a file: their names in the image, and in QEMU.
    pub fn mapped(&self) -> Vec<(String, String)> {
        match self {
            Launcher::Process(plan) => {
                plan.mapped.iter().map(|name| (name.clone(), name.clone())).collect()
            }
            Launcher::Domain(plan) => plan.mapped.clone(),
        }
    }

    /// What is recorded of a guest that is about to be started.
    pub fn record(&self, image: &Image) -> Record {
        let file = image.files().next().map(|(path, _)| path);
        let file = file.map(|path| std::path::absolute(path).unwrap_or(path.to_owned()));
        // One of a repository has a name alone.
        let path = file.unwrap_or_else(|| image.name().into());
        let pages = image.manifest().blocks.iter().map(|block| block.pages()).sum();
        Record {
            overlays: self.overlays().iter().filter_map(|disk| disk.path.clone()).collect(),
            sockets: match self {
                Launcher::Process(plan) => plan.sockets.clone(),
                Launcher::Domain(_) => Vec::new(),
            },
            ..Record::new(path, pages)
        }
    }

    /// Starts QEMU. A process is labelled with what says whose guest it is, should nobody be left
    /// who knows.
    pub async fn launch(self, label: String, cancel: &Cancellation) -> Result<Qemu, RevertError> {
        let interrupted = || RevertError::Interrupted("QEMU was not up yet");
        match self {
            Launcher::Process(mut plan) => {
                plan.label = label;
                let reach = plan.reach.clone();
                let (process, qmp) = tokio::select! {
                    started = Process::start(*plan) => started?,
                    () = cancel.requested() => return Err(interrupted()),
                };
                Ok(Qemu::ours(process, qmp, reach))
            }
            Launcher::Domain(plan) => {
                // libvirt can't be interrupted.
                let (domain, qmp) = StartedDomain::start(*plan).await?;
                match cancel.is_requested() {
                    true => Err(interrupted()),
                    false => Ok(Qemu::domain(domain, qmp)),
                }
            }
        }
    }
}

/// Where overlays go and what they are called: in the guest's own directory or else beside the
/// image, and after its name, unless the options say otherwise.
fn placed(options: &RevertOptions) -> OverlayOptions {
    let RevertOptions { rewrite, image, resettable: reset_point, .. } = options;
    let (options, reset_point) = (&rewrite.overlays, *reset_point);
    let parent = || image.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = options.directory.clone().or(rewrite.own.clone());
    let directory = directory.unwrap_or_else(|| parent().unwrap_or(Path::new(".")).to_owned());
    let name = || image.file_name().map(|name| name.to_string_lossy().into_owned());
    OverlayOptions {
        directory: Some(directory),
        prefix: options.prefix.clone().or_else(name),
        ephemeral: options.ephemeral,
        reset_point,
        far: options.far.clone(),
    }
}
