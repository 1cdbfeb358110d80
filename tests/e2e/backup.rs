//! Guests that are saved into a repository, one by `save`, or all of a file by `backup`.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::harness::{Dir, Ended, text};
use crate::support::proxy::Proxy;
use crate::support::s3::{BUCKET, S3Server, environment};
use crate::support::{Disk, Fill, Guest, GuestOptions, Qemu, Result};
use crate::tests;

tests! {
    a_backup_saves_what_it_can_and_names_what_failed
    a_save_that_could_not_be_pushed_is_pushed_by_the_next_backup
}

fn boot(dir: &Dir) -> Result<Guest> {
    let disks = vec![Disk::two(&dir.path(""), 64)?.remove(0)];
    let (qemu, fill) = (Qemu::V10, Fill::Mib(8));
    let options =
        GuestOptions { qemu, mib: 96, fill, writers: 0, disks, ..GuestOptions::default() };
    let mut guest = Guest::boot(&options)?;
    guest.oracle.ask("idle")?;
    Ok(guest)
}

/// The configuration with this text.
fn config(dir: &Dir, text: &str) -> Result<PathBuf> {
    let path = dir.path("backup.toml");
    fs::write(&path, text)?;
    Ok(path)
}

/// How often an event came, and its last one.
fn counted<'a>(ended: &'a Ended, name: &str) -> (usize, Option<&'a Value>) {
    let all: Vec<&Value> = ended.events.iter().filter(|event| event["event"] == name).collect();
    (all.len(), all.last().copied())
}

fn a_backup_saves_what_it_can_and_names_what_failed(dir: &Dir) -> Result<()> {
    let guest = boot(dir)?;
    let (repository, spool) = (dir.path("backups"), dir.path("spool"));
    let metrics = dir.make("metrics")?.join("snapback.prom");
    dir.snapback(&["init", "--repo", text(&repository)]).succeed()?;
    let to = dir.make("drill")?;
    let file = config(
        dir,
        &format!(
            "repository = {repository:?}\nspool = {spool:?}\nmetrics = {metrics:?}\n\
             [keep]\nlast = 1\n\
             [machines.web1]\nqmp = {:?}\npaths = {{ {:?} = {to:?} }}\n\
             [machines.gone]\nqmp = \"/no/such/qmp.sock\"\n",
            guest.qmp_path, guest.dir
        ),
    )?;
    let backup = |more: &[&str]| dir.snapback(&["backup", "--config", text(&file)]).with(more);
    let understood = backup(&["--check-config"]).succeed()?;
    assert_eq!(understood.event("backup_config")?["machines"], json!(["gone", "web1"]));

    let failed = backup(&[]).end()?;
    let message = failed.failure()?;
    assert!(message.contains("1 of 2") && message.ends_with("gone"), "{message}");
    let gone = failed.event("backup_failed")?;
    assert_eq!((&gone["machine"], &gone["code"]), (&"gone".into(), &"qemu_unreachable".into()));
    assert_eq!(failed.event("pushed")?["machine"], "web1");
    failed.event("pruned")?;
    let figures = fs::read_to_string(&metrics)?;
    for (machine, success) in [("gone", 0), ("web1", 1)] {
        let line = format!("snapback_backup_success{{machine=\"{machine}\"}} {success}\n");
        assert!(figures.contains(&line), "{figures}");
    }
    assert_eq!(dir.names("spool")?, Vec::<String>::new());
    assert_eq!(dir.names("metrics")?, ["snapback.prom"]);

    // The one machine alone; of two snapshots one is kept.
    let second = backup(&["web1"]).succeed()?;
    assert_eq!(counted(&second, "forgotten").0, 2, "{second:?}");
    let list = dir.snapback(&["list", "--repo", text(&repository)]).succeed()?;
    assert_eq!(counted(&list, "snapshot").0, 1, "{list:?}");
    assert!(fs::read_to_string(&metrics)?.contains("{machine=\"gone\"} 0\n"));

    // It can be reverted with what the file says of the other site, and the guest goes on as before.
    let cache = dir.path("cache");
    let drill = dir.snapback(&["drill", "web1@latest", "--repo", text(&repository)]);
    drill.with(&["--cache", text(&cache)]).succeed()?;
    let unknown = backup(&["web2"]).fail()?;
    assert!(unknown.contains("`web2`") && unknown.contains("gone, web1"), "{unknown}");
    Ok(())
}

fn a_save_that_could_not_be_pushed_is_pushed_by_the_next_backup(dir: &Dir) -> Result<()> {
    let guest = boot(dir)?;
    let mut server = S3Server::start(&dir.make("store")?)?;
    let proxy = Proxy::start(server.address())?;
    let reaches = |args: &[&str]| {
        let variables = environment(proxy.address());
        variables.iter().fold(dir.snapback(args), |c, (name, value)| c.env(name, value))
    };
    let (repository, spool) = (format!("s3://{BUCKET}/site"), dir.path("spool"));
    let name = format!("{repository}/web1");
    let save = |more: &[&str]| {
        let args = ["save", "--qmp", text(&guest.qmp_path), &name];
        reaches(&args).with(&["--spool", text(&spool), "--store-timeout", "1"]).with(more)
    };
    // Without a repository the guest is not touched.
    let none = save(&[]).end()?;
    assert_eq!(none.event("error")?["code"], "no_repository");
    assert!(!spool.exists());
    reaches(&["init", "--repo", &repository]).succeed()?;

    save(&["--tag", "golden"]).succeed()?.event("pushed")?;
    assert_eq!(dir.names("spool")?, Vec::<String>::new());
    let mut cut_off = save(&[]).start()?;
    cut_off.wait("moment")?;
    server.kill();
    let cut_off = cut_off.end()?;
    cut_off.event("saved")?;
    let error = cut_off.event("error")?;
    let message = error["message"].as_str().ok_or("no message")?;
    assert_eq!(error["code"], "store_unreachable");
    let left = dir.names("spool")?;
    let image = spool.join(left.first().ok_or("no spool")?).join("web1.snap");
    assert!(image.exists() && left.len() == 1, "{left:?}");
    assert!(
        message.contains(&format!("`snapback push {} --name web1`", text(&image))),
        "{message}"
    );

    let file = config(
        dir,
        &format!(
            "repository = {repository:?}\nspool = {spool:?}\nstore_timeout_s = 1\n\
             [machines.web1]\nqmp = {:?}\n",
            guest.qmp_path
        ),
    )?;
    // As long as it can't be pushed, nothing new is saved.
    reaches(&["backup", "--config", text(&file)]).fail()?;
    assert_eq!(dir.names("spool")?, left);
    server.start_again()?;
    let ended = reaches(&["backup", "--config", text(&file)]).succeed()?;
    assert_eq!(counted(&ended, "pushed").0, 2, "{ended:?}");
    assert_eq!(dir.names("spool")?, Vec::<String>::new());
    let list = reaches(&["list", "--repo", &repository]).succeed()?;
    assert_eq!(counted(&list, "snapshot").0, 3, "{list:?}");
    Ok(())
}
