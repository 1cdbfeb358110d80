//! A revert as a session, by the library: a guest that is held in standby, and a QEMU that
//! somebody else has started.

use std::fs;
use std::time::Duration;

use serde_json::json;
use snapback::cancel::Cancellation;
use snapback::image::Image;
use snapback::memory::WorkingSet;
use snapback::page::{BlockId, Page};
use snapback::revert::session::{Armed, Launched, Planned};
use snapback::revert::{RevertError, RevertEvent, RevertOptions, ServeOptions, Target};

use crate::harness::{Dir, check, text};
use crate::serving::Waiting;
use crate::shared::{Shared, shared};
use crate::support::{Attached, Qemu, Result, SerialLog, qmp, query_status};
use crate::{tests, tests_on_both};

tests_on_both! {
    a_guest_held_in_standby_runs_when_it_is_let_go
    a_qemu_of_somebody_else_is_armed_by_its_qmp
}

tests! {
    a_guest_in_standby_can_be_given_up
    a_qemu_of_somebody_else_is_armed_by_its_migration_socket
    a_qemu_of_somebody_else_that_does_not_hold_its_guest_is_told
}

/// How long a guest is held.
const HELD: Duration = Duration::from_secs(1);

/// A standby of the shared guest, its files in a new folder `reverted`.
fn standby(dir: &Dir, shared: &Shared) -> Result<RevertOptions> {
    let to = dir.make("reverted")?;
    let mut options = RevertOptions::new(&shared.image);
    options.rewrite.paths = vec![(text(&shared.from).into(), text(&to).into())];
    options.standby = true;
    // A working set, which would be sent ahead of a guest that is not in standby.
    let image = Image::open(&shared.image)?;
    let pages = (0..4096).map(|number| Page { block: BlockId(0), number });
    let set = WorkingSet::following(None, image.identity(), pages, &image.manifest().blocks);
    let file = dir.path("working-set");
    set.ok_or("no working set")?.store(&file)?;
    options.delivery.working_set_file = Some(file);
    Ok(options)
}

/// Holds a guest for a while, in which nothing of its memory is filled.
async fn hold(armed: &Armed) {
    // The direct transport may be being opened still, which sends a page of each block.
    tokio::time::sleep(HELD / 2).await;
    let before = armed.progress();
    tokio::time::sleep(HELD).await;
    let after = armed.progress();
    assert_eq!(before, after, "a guest that stands still was given memory");
    // What was asked for while the device state was loaded, with its neighbours.
    assert!(after.pages < after.total / 20, "{after:?}");
}

/// The names of events that have a fixed place, as the program prints them.
fn names(events: &[RevertEvent]) -> Vec<String> {
    let name = |event| serde_json::to_value(event).unwrap()["event"].as_str().map(str::to_owned);
    let names = events.iter().filter_map(name);
    names.filter(|name| !["progress", "placing"].contains(&name.as_str())).collect()
}

fn a_guest_held_in_standby_runs_when_it_is_let_go(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    let options = standby(dir, shared)?;
    let log = SerialLog::whole(&dir.path("reverted").join("serial0.log"));
    let mut events = Vec::new();
    tokio::runtime::Runtime::new()?.block_on(async {
        let mut tell = |event| events.push(event);
        let planned = Planned::new(&options, Cancellation::new(), &mut tell).await?;
        let armed = planned.launch(&mut tell).await?.arm(&mut tell).await?;
        hold(&armed).await;
        assert_eq!(armed.qmp().ok_or("no QMP")?.status().await?, "paused");
        assert!(log.last_beat().is_none(), "the guest ran");
        let running = armed.run(&mut tell).await?;
        let resident = running.fill(&mut tell).await?;
        let progress = resident.outcome().progress;
        assert_eq!(progress.pages, progress.total);
        let held = resident.into_held().ok_or("not our QEMU")?;
        let mut guest = Attached::to(held.pid() as u32, &dir.path("reverted"))?;
        assert_eq!(guest.oracle.nonce()?, shared.nonce);
        check(&mut guest)?;
        held.end().await;
        Ok::<_, crate::support::Error>(())
    })?;
    assert_eq!(names(&events), ["qemu_ready", "running", "resident"]);
    Ok(())
}

fn a_guest_in_standby_can_be_given_up(dir: &Dir) -> Result<()> {
    let options = standby(dir, shared(Qemu::V7)?)?;
    tokio::runtime::Runtime::new()?.block_on(async {
        let planned = Planned::new(&options, Cancellation::new(), &mut |_| {}).await?;
        let armed = planned.launch(&mut |_| {}).await?.arm(&mut |_| {}).await?;
        let pid = armed.pid().ok_or("no process")?;
        armed.end().await;
        assert!(crate::support::process_gone(pid as u32));
        // The same by cancelling it: it does not get to run.
        fs::remove_dir_all(dir.path("reverted"))?;
        fs::create_dir(dir.path("reverted"))?;
        let cancel = Cancellation::new();
        let planned = Planned::new(&options, cancel.clone(), &mut |_| {}).await?;
        let armed = planned.launch(&mut |_| {}).await?.arm(&mut |_| {}).await?;
        cancel.request();
        let ran = armed.run(&mut |event| panic!("{event:?}")).await.map(drop);
        assert!(matches!(ran, Err(RevertError::Interrupted(_))), "{ran:?}");
        Ok::<_, crate::support::Error>(())
    })?;
    assert!(dir.sockets("reverted")?.is_empty());
    Ok(())
}

fn a_qemu_of_somebody_else_is_armed_by_its_qmp(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    let waiting = Waiting::deferred(dir, shared, &["-S"])?;
    let mut options = ServeOptions::new(&shared.image, Target::Qmp(waiting.qmp_path()));
    options.standby = true;
    let mut events = Vec::new();
    tokio::runtime::Runtime::new()?.block_on(async {
        let mut tell = |event| events.push(event);
        let launched = Launched::outside(&options, Cancellation::new()).await?;
        let armed = launched.arm(&mut tell).await?;
        hold(&armed).await;
        assert_eq!(armed.qmp().ok_or("no QMP")?.status().await?, "paused");
        let resident = armed.run(&mut tell).await?.fill(&mut tell).await?;
        assert!(resident.into_held().is_none());
        Ok::<_, crate::support::Error>(())
    })?;
    assert_eq!(names(&events), ["running", "resident"]);
    let mut guest = Attached::to(waiting.qemu.id(), &waiting.folder)?;
    assert_eq!(guest.oracle.nonce()?, shared.nonce);
    check(&mut guest)?;
    // It is left as a QEMU that was never migrated.
    assert_eq!(query_status(&guest.qmp_path)?, "running");
    let capabilities = qmp(&guest.qmp_path, "query-migrate-capabilities", json!({}))?;
    let is_on = |name: &str| {
        let list = capabilities.as_array().into_iter().flatten();
        list.clone().any(|one| one["capability"] == name && one["state"] == true)
    };
    assert!(!is_on("postcopy-ram") && !is_on("events"), "{capabilities}");
    Ok(())
}

/// The owner has the QMP, and says when the guest runs.
fn a_qemu_of_somebody_else_is_armed_by_its_migration_socket(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V10)?;
    let waiting = Waiting::start(dir, shared, true, &["-S"])?;
    let to = Target::Migration(waiting.socket.clone());
    let mut options = ServeOptions::new(&shared.image, to);
    options.standby = true;
    tokio::runtime::Runtime::new()?.block_on(async {
        let launched = Launched::outside(&options, Cancellation::new()).await?;
        let armed = launched.arm(&mut |_| {}).await?;
        hold(&armed).await;
        assert!(armed.qmp().is_none());
        assert_eq!(query_status(&waiting.qmp_path())?, "paused");
        let running = armed.run(&mut |_| {}).await?;
        qmp(&waiting.qmp_path(), "cont", json!({}))?;
        running.fill(&mut |_| {}).await?;
        Ok::<_, crate::support::Error>(())
    })?;
    let mut guest = Attached::to(waiting.qemu.id(), &waiting.folder)?;
    assert_eq!(guest.oracle.nonce()?, shared.nonce);
    check(&mut guest)
}

fn a_qemu_of_somebody_else_that_does_not_hold_its_guest_is_told(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V7)?;
    let waiting = Waiting::deferred(dir, shared, &[])?;
    let mut options = ServeOptions::new(&shared.image, Target::Qmp(waiting.qmp_path()));
    options.standby = true;
    let armed = tokio::runtime::Runtime::new()?.block_on(async {
        let launched = Launched::outside(&options, Cancellation::new()).await?;
        launched.arm(&mut |_| {}).await.map(drop)
    });
    let error = armed.err().ok_or("it was armed")?.to_string();
    assert!(error.contains("`-S`"), "{error}");
    Ok(())
}
