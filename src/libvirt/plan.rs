//! How a saved domain is started again: its definition, changed, and the overlays of its disks.

use std::path::Path;

use uuid::Uuid;

use super::address::DomainAddress;
use super::definition::{Definition, DefinitionError};
use super::options::DomainOptions;
use super::sibling::Sibling;
use super::stand_in::StandIn;
use crate::guest::{
    GuestError, MappedMemory, Note, Overlay, OverlayOptions, RewriteOptions, moved, overlays,
};
use crate::kind::ErrorKind;
use crate::machine::{Disk, Machine};

/// What has QEMU wait for its guest's state.
const INCOMING: [&str; 2] = ["-incoming", "defer"];

/// How the name of a block begins that we have QEMU map in the place of libvirt's own.
const MAPPED: &str = "snapback-map.";

/// The name that a block of a domain has where libvirt starts it without us.
pub fn block_name(name: &str) -> &str {
    name.strip_prefix(MAPPED).unwrap_or(name)
}

/// A domain's command line without the arguments that a start by us has left in it.
pub fn without_our_arguments(argv: Vec<String>, live_xml: &str) -> Vec<String> {
    match Definition::parse(live_xml) {
        Ok(definition) => definition.remove_from_command_line(argv),
        Err(_) => argv,
    }
}

/// Why a domain can't be planned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The image holds no domain.
    #[error(
        "the image holds no domain of libvirt's: it was saved by QEMU's own control socket; revert \
         it without `RevertOptions::domain`"
    )]
    NoDomain,
    /// The image holds another domain.
    #[error(
        "the image holds the domain `{recorded}`, not `{asked}`: name that one, or have \
         `DomainOptions::sibling` make one of another name"
    )]
    OtherDomain {
        /// The name or UUID that was asked for.
        asked: String,
        /// The saved domain's name.
        recorded: String,
    },
    /// A disk of the image is not in the domain's definition.
    #[error("the disk {0} is not in the definition of the domain that was saved with it")]
    NoSuchDisk(String),
    /// The definition can't be used.
    #[error(transparent)]
    Definition(#[from] DefinitionError),
    /// The disks can't be used.
    #[error(transparent)]
    Guest(#[from] GuestError),
}

impl PlanError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        match self {
            PlanError::NoDomain | PlanError::OtherDomain { .. } => ErrorKind::OptionsInvalid,
            PlanError::NoSuchDisk(_) => ErrorKind::NoSuchDisk,
            PlanError::Definition(_) => ErrorKind::InputInvalid,
            PlanError::Guest(error) => error.kind(),
        }
    }
}

/// A domain that could be started: nothing is touched.
#[derive(Debug)]
pub struct DomainPlan {
    /// Its name.
    pub name: String,
    /// The libvirt that starts it; the default one without.
    pub uri: Option<String>,
    /// Whether a running domain of that name is ended first.
    pub replace: bool,
    /// The definition to start, as XML.
    pub xml: String,
    /// The definition to keep once it runs, as XML.
    pub persistent: Option<String>,
    /// The memory that QEMU maps: the name of the image's block, and that of QEMU's.
    pub mapped: Vec<(String, String)>,
    /// The file from which QEMU maps it, which has to be made.
    pub memory: Option<StandIn>,
    /// The overlays to create first.
    pub overlays: Vec<Overlay>,
    /// What differs from the record.
    pub notes: Vec<Note>,
}

impl DomainPlan {
    /// The domain that it will be.
    pub fn domain(&self) -> DomainAddress {
        DomainAddress { uri: self.uri.clone(), ..DomainAddress::new(&self.name) }
    }

    /// Plans the start of the domain of this image's machine, whose main memory is mapped where
    /// there is `memory` to map. Of `rewrite`, the paths, disks and overlays count.
    ///
    /// # Errors
    /// When the image holds no such domain, or its disks are not as they were.
    pub fn new(
        machine: &Machine,
        image: &Path,
        options: &DomainOptions,
        rewrite: &RewriteOptions,
        memory: Option<&MappedMemory>,
    ) -> Result<DomainPlan, PlanError> {
        let mut saved = Saved::read(machine, options.define)?;
        check_name(&saved.start, options.domain.as_deref())?;
        let name = options.sibling.clone().unwrap_or_else(|| saved.start.name());
        let overlays = saved.put_on_overlays(machine, rewrite, &name)?;
        let mut notes = Vec::new();
        match options.sibling.as_deref().map(Sibling::new) {
            Some(sibling) => {
                saved.definitions().for_each(|definition| sibling.put_into(definition));
                notes.extend(saved.start.has_network_cards().then(other_addresses));
            }
            // The guest learns by it that it went back in time (libvirt's formatdomain, `genid`).
            None => saved.start.set_text("genid", &Uuid::new_v4().to_string(), false),
        }
        let (mut arguments, mut mapped, mut stand_in) = (Vec::new(), Vec::new(), None);
        if let Some(memory) = memory {
            saved.start.refuse_other_memory()?;
            let directory = rewrite.overlays.directory.as_deref().or(memory.file.parent());
            let file = StandIn::plan(&memory.file, &name, directory.unwrap_or(Path::new("/")));
            let memory = MappedMemory { file: file.path.clone(), ..memory.clone() };
            let (more, block) = memory.in_front(MAPPED)?;
            arguments = more;
            mapped.push((block.clone(), format!("{MAPPED}{block}")));
            stand_in = Some(file);
        }
        arguments.extend(INCOMING.map(str::to_owned));
        saved.start.add_arguments(&arguments, image);
        Ok(DomainPlan {
            name,
            uri: options.uri.clone(),
            replace: options.replace,
            xml: saved.start.to_xml()?,
            persistent: saved.persistent.map(|definition| definition.to_xml()).transpose()?,
            mapped,
            memory: stand_in,
            overlays,
            notes,
        })
    }
}

/// The domain of an image's machine for libvirt's own `restore`: its definition as XML, and the
/// overlays of its disks that have to be created. They are called after `name`.
///
/// # Errors
/// When the image holds no domain, or its disks are not as they were.
pub fn restorable(machine: &Machine, name: &str) -> Result<(String, Vec<Overlay>), PlanError> {
    let mut saved = Saved::read(machine, false)?;
    let overlays = saved.put_on_overlays(machine, &RewriteOptions::default(), name)?;
    Ok((saved.start.to_xml()?, overlays))
}

/// The definitions that an image holds.
struct Saved {
    /// As it ran.
    start: Definition,
    /// As it starts anew.
    persistent: Option<Definition>,
}

impl Saved {
    /// Those of an image's machine, without what a start by us has left in them; the persistent
    /// one where it is `wanted`.
    fn read(machine: &Machine, wanted: bool) -> Result<Saved, PlanError> {
        let live = machine.libvirt_xml.as_deref().ok_or(PlanError::NoDomain)?;
        let inactive = machine.libvirt_inactive_xml.as_deref().unwrap_or(live);
        let start = Definition::parse(live)?;
        let persistent = wanted.then(|| Definition::parse(inactive)).transpose()?;
        let mut saved = Saved { start, persistent };
        saved.definitions().for_each(Definition::remove_what_we_left);
        Ok(saved)
    }

    fn definitions(&mut self) -> impl Iterator<Item = &mut Definition> {
        [Some(&mut self.start), self.persistent.as_mut()].into_iter().flatten()
    }

    /// Replaces paths, and puts the captured disks on overlays, which are called after `name` and
    /// lie beside the frozen files unless `rewrite` says otherwise: there QEMU may read.
    fn put_on_overlays(
        &mut self,
        machine: &Machine,
        rewrite: &RewriteOptions,
        name: &str,
    ) -> Result<Vec<Overlay>, PlanError> {
        let moved = moved(&rewrite.paths)?;
        let prefix = rewrite.overlays.prefix.clone().or_else(|| Some(name.to_owned()));
        let options = OverlayOptions { prefix, ..rewrite.overlays.clone() };
        let overlays = overlays(&machine.disks, &rewrite.disks, &options, &moved)?;
        self.definitions().for_each(|definition| definition.replace_paths(&moved));
        for (at, overlay) in &overlays {
            let disk = &machine.disks[*at];
            let paths: Vec<_> = files(disk).map(&moved).collect();
            let path = overlay.path.as_deref().and_then(Path::to_str).unwrap_or_default();
            if !self.start.put_on_overlay(&paths, path) {
                return Err(PlanError::NoSuchDisk(disk.describe()));
            }
            // One that was plugged in may not be in it.
            self.persistent.as_mut().map(|definition| definition.put_on_overlay(&paths, path));
        }
        Ok(overlays.into_iter().map(|(_, overlay)| overlay).collect())
    }
}

fn other_addresses() -> Note {
    Note {
        what: "the network cards have other addresses in the domain's definition".into(),
        why: "the guest sends by the old ones until it loads their driver anew: keep it on a \
              network of its own, or have it do so"
            .into(),
    }
}

fn check_name(saved: &Definition, asked: Option<&str>) -> Result<(), PlanError> {
    let recorded = saved.name();
    match asked {
        Some(asked) if asked != recorded && asked != saved.uuid() => {
            Err(PlanError::OtherDomain { asked: asked.to_owned(), recorded })
        }
        _ => Ok(()),
    }
}

/// The files by which a definition may name a captured disk: the frozen one, or the overlay that
/// the guest it was saved from went on with.
fn files(disk: &Disk) -> impl Iterator<Item = &str> {
    let frozen = disk.chain.first().map(|file| file.path.as_str());
    frozen.into_iter().chain(disk.overlay.as_deref())
}
