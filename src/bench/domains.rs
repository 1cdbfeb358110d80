//! A domain of libvirt's: brought back as a sibling, which goes with the run, beside libvirt's own
//! ways.
//!
//! What libvirt's own ways load is made from another sibling, which was brought back from the same
//! image: it is saved as `virsh save` does, and restored, and an internal snapshot is taken of it.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::runs::{Recorder, unless_interrupted};
use super::setup::Setup;
use super::{BenchError, Cache, Method, Sample, Skipped};
use crate::cancel::Cancellation;
use crate::guest::RewriteOptions;
use crate::libvirt::{
    Definition, Domain, DomainAddress, DomainOptions, LibvirtError, remove_stand_ins,
};
use crate::revert::{
    Delivery, Outcome, Placement, RevertError, RevertEvent, RevertOptions, revert,
};

/// The internal snapshot's name.
const SNAPSHOT: &str = "snapback-bench";

/// The ways of a domain.
pub(super) struct Domains<'a> {
    setup: &'a Setup<'a>,
    domain: &'a DomainAddress,
    /// The sibling of each run of ours.
    name: String,
    /// What libvirt brings back.
    peer: Option<Peer>,
}

/// A sibling that libvirt brings back.
struct Peer {
    sibling: Sibling,
    /// Its definition.
    xml: String,
    /// It as `virsh save` has saved it.
    file: PathBuf,
    disks: Vec<Disk>,
}

/// A disk of the peer's. Dropping it removes all of its files.
struct Disk {
    /// Where the domain has it.
    path: PathBuf,
    /// As it was when the domain was saved.
    saved: PathBuf,
    /// With the internal snapshot, between two runs.
    snapshot: PathBuf,
}

impl Disk {
    fn new(path: PathBuf) -> Disk {
        let beside = |name: &str| path.with_extension(name);
        Disk { saved: beside("saved"), snapshot: beside("snapshot"), path }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        for path in [&self.path, &self.saved, &self.snapshot] {
            // Not all of them are there at any time.
            let _ = fs::remove_file(path);
        }
    }
}

/// A domain that was made for a run. Dropping it ends it; libvirt forgets it, and its files go.
struct Sibling {
    address: DomainAddress,
    image: PathBuf,
}

impl Drop for Sibling {
    fn drop(&mut self) {
        let Sibling { address, image } = self;
        if let Err(error) = Domain::remove_now(address) {
            tracing::warn!("the domain {} is left: {error}", address.domain);
        }
        remove_stand_ins(image, &address.domain);
    }
}

/// A guest that was brought back by us.
struct Back {
    _sibling: Sibling,
    recorder: Recorder,
    outcome: Outcome,
    /// The overlays that were made for it.
    overlays: Vec<PathBuf>,
}

impl<'a> Domains<'a> {
    /// For siblings of this domain. Nothing is done yet.
    pub fn new(setup: &'a Setup<'a>, domain: &'a DomainAddress) -> Domains<'a> {
        let unique = Uuid::new_v4().simple().to_string();
        Domains { setup, domain, name: format!("snapback-bench-{}", &unique[..8]), peer: None }
    }

    /// Whether libvirt's own ways are wanted.
    pub fn has_peers(&self) -> bool {
        self.setup.options.peers
    }

    /// Brings the domain back once by each of our ways. Returns those that work, and the others with
    /// why.
    pub async fn try_out(
        &self,
        cancel: &Cancellation,
    ) -> Result<(Vec<Method>, Vec<Skipped>), BenchError> {
        drop(self.bring_back(&self.name, Placement::Auto, cancel).await?);
        let mapped = Method::DomainMapped;
        match self.bring_back(&self.name, Placement::Map, cancel).await {
            Ok(_) => Ok((vec![Method::Domain, mapped], Vec::new())),
            Err(BenchError::Revert(error)) => {
                let skipped = Skipped { way: mapped, reason: error.to_string() };
                Ok((vec![Method::Domain], vec![skipped]))
            }
            Err(error) => Err(error),
        }
    }

    /// The QEMU that was saved.
    pub fn qemu(&self) -> String {
        let version = &self.setup.machine.qemu;
        format!("{version} {}", version.package).trim_end().to_owned()
    }

    /// Makes what libvirt's own ways load. Returns the ways that work, and the others with why.
    pub async fn make_peers(
        &mut self,
        cancel: &Cancellation,
    ) -> Result<(Vec<Method>, Vec<Skipped>), BenchError> {
        let name = format!("{}-peer", self.name);
        let Back { _sibling: sibling, overlays, .. } =
            self.bring_back(&name, Placement::Auto, cancel).await?;
        let disks: Vec<Disk> = overlays.into_iter().map(Disk::new).collect();
        let domain = Domain::open(&sibling.address, Duration::ZERO).await?;
        let mut definition = Definition::parse(&domain.live_xml().await?)
            .map_err(|error| BenchError::Definition(error.to_string()))?;
        // Nor is there another start of ours in what libvirt starts.
        definition.remove_what_we_left();
        let xml = definition.to_xml().map_err(|error| BenchError::Definition(error.to_string()))?;
        let file = self.setup.beside.path().join("libvirt-save");
        let peer = Peer { sibling, xml, file, disks };
        domain.save_to(peer.file(), peer.xml.clone()).await?;
        for disk in &peer.disks {
            copy(&disk.path, &disk.saved)?;
        }

        let domain = Domain::restore(peer.address(), peer.file()).await?;
        // Snapshots of a domain without a persistent definition go with it.
        domain.define(peer.xml.clone()).await?;
        let taken = domain.take_snapshot(SNAPSHOT).await;
        domain.destroy().await?;
        for disk in &peer.disks {
            rename(&disk.path, &disk.snapshot)?;
        }
        self.peer = Some(peer);
        let mut methods = vec![Method::DomainStart, Method::DomainRestore];
        match taken {
            Ok(()) => methods.push(Method::DomainSnapshot),
            // Some QEMUs end over it.
            Err(error @ (LibvirtError::Refused { .. } | LibvirtError::ShutOff { .. })) => {
                let skipped = Skipped { way: Method::DomainSnapshot, reason: error.to_string() };
                return Ok((methods, vec![skipped]));
            }
            Err(error) => return Err(error.into()),
        }
        Ok((methods, Vec::new()))
    }

    /// Measures one run.
    pub async fn measure(
        &self,
        method: Method,
        cache: Cache,
        round: u32,
        cancel: &Cancellation,
    ) -> Result<Sample, BenchError> {
        if cancel.is_requested() {
            return Err(BenchError::Interrupted);
        }
        let setup = self.setup;
        let Some(peer) = self.peer.as_ref().filter(|_| method.is_peer()) else {
            setup.settle(cache, &setup.image_files)?;
            let placement = match method {
                Method::DomainMapped => Placement::Map,
                _ => Placement::Auto,
            };
            let back = self.bring_back(&self.name, placement, cancel).await?;
            let Back { recorder, outcome, .. } = back;
            return Ok(recorder.sample(setup, method, cache, round, Some(&outcome), None));
        };
        let from_snapshot = method == Method::DomainSnapshot;
        for disk in &peer.disks {
            match from_snapshot {
                true => rename(&disk.snapshot, &disk.path)?,
                false => copy(&disk.saved, &disk.path)?,
            }
        }
        let files = match method {
            Method::DomainRestore => vec![peer.file.clone()],
            Method::DomainSnapshot => peer.disks.iter().map(|disk| disk.path.clone()).collect(),
            _ => Vec::new(),
        };
        setup.settle(cache, &files)?;
        let mut recorder = Recorder::begin(None);
        let address = peer.address();
        let domain = match method {
            Method::DomainRestore => Domain::restore(address, peer.file()).await?,
            Method::DomainSnapshot => Domain::revert_to_snapshot(address, SNAPSHOT).await?,
            _ => Domain::create(address, peer.xml.clone(), false).await?,
        };
        let at = Instant::now();
        match method {
            Method::DomainStart => recorder.ready_at(at),
            _ => recorder.ran_at(at, domain.monitor().await?.peer_pid().unwrap_or_default()),
        }
        domain.destroy().await?;
        if from_snapshot {
            for disk in &peer.disks {
                rename(&disk.path, &disk.snapshot)?;
            }
        }
        Ok(recorder.sample(setup, method, cache, round, None, None))
    }

    /// Brings the domain back by snapback, as a sibling of this name, until all memory is in place.
    async fn bring_back(
        &self,
        name: &str,
        placement: Placement,
        cancel: &Cancellation,
    ) -> Result<Back, BenchError> {
        let domain = DomainOptions {
            uri: self.domain.uri.clone(),
            domain: Some(self.domain.domain.clone()),
            sibling: Some(name.to_owned()),
            ..DomainOptions::new()
        };
        let setup = self.setup;
        let options = RevertOptions {
            rewrite: RewriteOptions {
                paths: setup.options.paths.clone(),
                ..RewriteOptions::default()
            },
            delivery: Delivery {
                placement,
                working_set: false,
                collapse: false,
                fail_on_damage: true,
                ..Delivery::default()
            },
            domain: Some(domain),
            ..RevertOptions::new(&setup.options.image)
        };
        let mut recorder = Recorder::begin(None);
        let mut overlays = Vec::new();
        let ours = Cancellation::new();
        let (done, interrupted) = {
            let revert = revert(&options, ours.clone(), |event| {
                if let RevertEvent::Disk { overlay: Some(path), .. } = &event {
                    overlays.push(path.clone());
                }
                recorder.hear(&event);
            });
            unless_interrupted(revert, &ours, cancel).await
        };
        let address = DomainAddress { uri: self.domain.uri.clone(), ..DomainAddress::new(name) };
        let sibling = Sibling { address, image: setup.options.image.clone() };
        match done {
            Err(RevertError::Interrupted(_)) => Err(BenchError::Interrupted),
            Ok(_) if interrupted => Err(BenchError::Interrupted),
            done => Ok(Back { _sibling: sibling, recorder, outcome: done?.outcome, overlays }),
        }
    }
}

impl Peer {
    fn address(&self) -> DomainAddress {
        self.sibling.address.clone()
    }

    fn file(&self) -> String {
        self.file.display().to_string()
    }
}

fn copy(from: &PathBuf, to: &PathBuf) -> Result<(), BenchError> {
    let failed = |source| BenchError::File { doing: "copied for a run", path: from.into(), source };
    fs::copy(from, to).map(drop).map_err(failed)
}

fn rename(from: &PathBuf, to: &PathBuf) -> Result<(), BenchError> {
    let failed = |source| BenchError::File { doing: "renamed", path: from.into(), source };
    fs::rename(from, to).map_err(failed)
}
