//! The network breaks, and the store refuses.

use std::fs;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{Memory, Site, event, events, failure, read_events, same, start};
use crate::support::proxy::Fault;
use crate::support::{Result, wait_until};

/// A site with a repository and an image to push.
fn site(mib: usize) -> Result<Site> {
    let site = Site::new()?;
    site.run(&["init"])?;
    Memory::new("web1", 1, mib).save(&site.path("vm.snap"), None)?;
    Ok(site)
}

const SLOW_DOWN: Fault = Fault::Status(503, "<Error><Code>SlowDown</Code></Error>");

#[test]
fn what_passes_is_tried_again() -> Result<()> {
    let site = site(40)?;
    let proxy = &site.proxy;
    proxy.set_latency(Duration::from_millis(2));
    proxy.fail("PUT", "/packs/", 3, SLOW_DOWN);
    proxy.fail("PUT", "/packs/", 1, Fault::Drop);
    proxy.fail("GET", "list-type", 2, Fault::Status(500, ""));
    // An answer that is lost: the manifest is there by the second try.
    proxy.fail("PUT", "/snapshots/web1/", 1, Fault::Truncate(0));
    let pushed = site.run(&["push", "vm.snap"])?;
    assert_eq!(event(&pushed, "pushed")?["was_there"], false);
    // People are told of what takes long.
    assert_eq!(event(&pushed, "store_waiting")?["patience_s"], 120);
    event(&pushed, "store_back")?;

    proxy.fail("GET", "/packs/", 1, Fault::Truncate(100_000));
    proxy.fail("GET", "/packs/", 2, Fault::Status(429, ""));
    proxy.fail("GET", "/maps/", 1, Fault::Truncate(10));
    site.run(&["pull", "web1", "back.snap"])?;
    assert!(same(&site.path("back.snap"), &site.path("vm.snap"))?);
    Ok(())
}

#[test]
fn what_does_not_pass_is_told_by_its_kind() -> Result<()> {
    let mut site = site(4)?;
    site.run(&["push", "vm.snap"])?;
    let pull =
        |site: &Site| failure(site.snapback(&["pull", "web1", "x.snap", "--store-timeout", "1"]));
    let expired = "<Error><Code>ExpiredToken</Code></Error>";
    for (fault, code) in [
        (Fault::Status(403, ""), ("store_denied", 3)),
        (Fault::Status(401, ""), ("store_denied", 3)),
        (Fault::Status(400, expired), ("store_denied", 3)),
        (SLOW_DOWN, ("store_throttled", 1)),
        (Fault::Status(502, ""), ("store_unreachable", 1)),
        (Fault::Truncate(5), ("store_unreachable", 1)),
        (Fault::Status(404, ""), ("repository_damaged", 4)),
    ] {
        site.proxy.fail("GET", "/maps/", 1000, fault.clone());
        assert_eq!(pull(&site)?, (code.0.to_owned(), code.1), "{fault:?}");
        site.proxy.heal();
    }
    let mut wrong = site.snapback(&["list"]);
    wrong.env("AWS_SECRET_ACCESS_KEY", "wrong-secret-key");
    let output = wrong.output()?;
    assert_eq!(read_events(&output)?.last().ok_or("nothing")?["code"], "store_denied");
    let said = [output.stdout, output.stderr].concat();
    assert!(!String::from_utf8_lossy(&said).contains("wrong-secret-key"));
    site.server.kill();
    assert_eq!(pull(&site)?, ("store_unreachable".into(), 1));
    assert!(!site.path("x.snap").exists());
    Ok(())
}

#[test]
fn a_pull_survives_a_server_that_is_killed_and_started_again() -> Result<()> {
    let mut site = site(40)?;
    site.run(&["push", "vm.snap"])?;
    site.proxy.set_rate(Some(20 << 20));
    let (received, _) = site.proxy.bytes();
    let mut pull = start(site.snapback(&["pull", "web1", "back.snap"]))?;
    let came = |mib: u64| move |site: &Site| site.proxy.bytes().0 - received > mib << 20;
    wait_until(Duration::from_secs(60), "some of it", || came(4)(&site))?;
    site.server.kill();
    site.proxy.set_down(true);
    assert!(pull.try_wait()?.is_none());
    site.server.start_again()?;
    site.proxy.heal();
    assert!(pull.wait()?.success());
    assert!(same(&site.path("back.snap"), &site.path("vm.snap"))?);
    Ok(())
}

#[test]
fn a_push_that_was_killed_goes_on_where_it_was() -> Result<()> {
    let site = site(150)?;
    let total = fs::metadata(site.path("vm.snap"))?.len();
    // Killed in the middle: whole packs are not sent again.
    site.proxy.set_rate(Some(60 << 20));
    let mut push = start(site.snapback(&["push", "vm.snap"]))?;
    let drafts = || crate::support::files(&site.server.objects().join("site/index"));
    let is_there = || drafts().is_ok_and(|drafts| drafts.len() >= 2);
    wait_until(Duration::from_secs(60), "two packs", is_there)?;
    push.kill()?;
    push.wait()?;
    site.proxy.set_rate(None);
    // Nobody sees half of it.
    assert!(site.run(&["list"])?.is_empty());
    assert_eq!(failure(site.snapback(&["pull", "web1", "x.snap"]))?.0, "no_such_snapshot");
    // Stopped and killed behind its last pack: nothing is sent again.
    let mut second = site.snapback(&["push", "vm.snap"]);
    second.env("SNAPBACK_TEST_STOP_AT", "push-before-look");
    let (_, before) = site.proxy.bytes();
    let mut second = start(second)?;
    crate::harness::wait_for_stop(&second)?;
    let sent = site.proxy.bytes().1 - before;
    assert!(sent < total - (30 << 20), "{sent} of {total}");
    second.kill()?;
    second.wait()?;
    let pushed = site.run(&["push", "vm.snap"])?;
    assert_eq!(event(&pushed, "pushed")?["own_bytes"], 0);
    site.run(&["pull", "web1", "back.snap"])?;
    assert!(same(&site.path("back.snap"), &site.path("vm.snap"))?);
    Ok(())
}

#[test]
fn two_pushes_at_once_and_a_prune_beside_them_harm_nobody() -> Result<()> {
    let site = site(8)?;
    // They have half of their memory in common.
    let mut other = Memory::new("web2", 1, 8);
    other.bytes[..1 << 20].copy_from_slice(&crate::harness::noise(9, 1 << 20));
    other.save(&site.path("other.snap"), None)?;
    let mut pushes = Vec::new();
    for image in ["vm.snap", "other.snap"] {
        let mut push = site.snapback(&["push", image]);
        push.env("SNAPBACK_TEST_STOP_AT", "push-before-manifest");
        pushes.push(start(push)?);
    }
    pushes.iter().try_for_each(crate::harness::wait_for_stop)?;
    // All of their packs are referred to by nothing. The prune sees who is at work.
    for _ in 0..2 {
        let pruned = site.run(&["prune", "--grace", "0s"])?;
        let pruned = event(&pruned, "pruned")?;
        assert_eq!((&pruned["removed_packs"], &pruned["marked_packs"]), (&0.into(), &0.into()));
    }
    for push in &mut pushes {
        kill(Pid::from_raw(push.id() as i32), Signal::SIGCONT)?;
        assert!(push.wait()?.success());
    }
    for (name, image) in [("web1", "vm.snap"), ("web2", "other.snap")] {
        site.run(&["pull", name, &format!("{name}.back")])?;
        assert!(same(&site.path(&format!("{name}.back")), &site.path(image))?);
    }
    // A pack that only a forgotten snapshot needs is marked while a push is under way that may refer to
    // it, and stays for that one.
    site.run(&["forget", "web1"])?;
    let mut push = site.snapback(&["push", "vm.snap", "--name", "web3"]);
    push.env("SNAPBACK_TEST_STOP_AT", "push-before-manifest");
    let mut push = start(push)?;
    crate::harness::wait_for_stop(&push)?;
    let pruned = site.run(&["prune", "--grace", "0s"])?;
    assert_eq!(event(&pruned, "pruned")?["removed_packs"], 0);
    kill(Pid::from_raw(push.id() as i32), Signal::SIGCONT)?;
    assert!(push.wait()?.success());
    let check = ["check", "--repo", "s3://snapshots/site", "--read-data", "100%"];
    assert_eq!(event(&site.run(&check)?, "repository_checked")?["damages"], 0);
    site.run(&["prune", "--grace", "0s"])?;
    assert_eq!(event(&site.run(&check)?, "repository_checked")?["damages"], 0);
    Ok(())
}

#[test]
fn a_bucket_that_lists_late_loses_nothing() -> Result<()> {
    let site = site(4)?;
    site.run(&["push", "vm.snap"])?;
    // Its manifest is not listed yet: its packs are marked, and nothing more.
    site.proxy.fail("GET", "prefix=site%2Fsnapshots", 1, Fault::Hide("snapshots/web1".into()));
    let pruned = site.run(&["prune"])?;
    assert_eq!(event(&pruned, "pruned")?["marked_packs"], 1);
    // The second look finds it.
    let pruned = site.run(&["prune", "--grace", "0s"])?;
    let pruned = event(&pruned, "pruned")?;
    assert_eq!((&pruned["removed_packs"], &pruned["kept_packs"]), (&0.into(), &1.into()));
    events(site.snapback(&["pull", "web1", "back.snap"]))?;
    assert!(same(&site.path("back.snap"), &site.path("vm.snap"))?);
    Ok(())
}
