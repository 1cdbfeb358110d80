//! Images on top of others: saved from guests that came from them, moved, and lost.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::harness::{Dir, Ended, Reverted, text};
use crate::shared::{copy, shared};
use crate::support::{Qemu, Result, SOON, cont, wait_until};
use crate::{tests, tests_on_both_at_length};

tests_on_both_at_length! {
    a_chain_of_three_comes_back
}

tests! {
    a_parent_that_can_not_be_is_refused_before_the_guest_is_touched
}

/// Pages of 4096 bytes that a save stored in its own file.
fn own_pages(saved: &Ended) -> Result<u64> {
    let saved = saved.event("saved")?;
    let count = |name: &str| saved[name].as_u64().ok_or("a count is missing");
    Ok(count("pages")? - count("parent_pages")?)
}

fn a_chain_of_three_comes_back(dir: &Dir, qemu: Qemu) -> Result<()> {
    let base = dir.path("base.snap");
    let shared = copy(qemu, &base)?;
    let to = dir.make("first")?;
    let paused = dir.revert(&base, &shared.from, &to).with(&["--", "-S"]);
    let mut first = Reverted::of(paused, &to)?;
    first.resident()?;
    cont(&first.qmp_path)?;
    first.oracle.set_writers(0, 0)?;
    let saved = dir.save(&first, "1.snap").with(&["--parent", text(&base)]).succeed()?;
    let all = saved.event("saved")?["pages"].as_u64().unwrap();
    assert!(own_pages(&saved)? < all, "{:?}", saved.said);

    // Now few pages change: 64 of the guest's, and what its kernel needs for that.
    let rewritten = first.oracle.stat("rewritten")?;
    first.oracle.ask("writers 1 0 64")?;
    wait_until(SOON, "pages to be rewritten", || {
        first.oracle.stat("rewritten").is_ok_and(|now| now > rewritten + 1000)
    })?;
    first.oracle.set_writers(0, 0)?;
    let sum = first.oracle.sum()?;
    let parent = dir.path("1.snap");
    let saved = dir.save(&first, "2.snap").with(&["--parent", text(&parent)]).succeed()?;
    let own = own_pages(&saved)?;
    assert!(own >= 32 && own < all / 8, "{own} of {all}");
    let len = |name: &str| Ok::<_, std::io::Error>(fs::metadata(dir.path(name))?.len());
    assert!(len("2.snap")? < len("base.snap")? / 4);
    first.check(&shared.nonce)?;
    let from = first.dir.clone();
    drop(first);

    // From another folder, all of them moved.
    fs::create_dir(dir.path("moved"))?;
    for name in ["base.snap", "1.snap", "2.snap"] {
        fs::rename(dir.path(name), dir.path("moved").join(name))?;
    }
    let last = dir.path("moved/2.snap");
    comes_back(dir, &last, &from, "second", &sum, &shared.nonce)?;
    let info = dir.snapback(&["info", text(&last)]).succeed()?.events[0].clone();
    let paths: Vec<_> = info["layers"].as_array().unwrap().iter().map(|l| &l["path"]).collect();
    let path =
        |name: &str| Value::from(text(&dir.path("moved").canonicalize().unwrap().join(name)));
    assert_eq!(paths, [&path("1.snap"), &path("base.snap")]);
    let verified = dir.snapback(&["verify", "--chain", text(&last)]).succeed()?;
    assert_eq!(verified.event("verified")?["parents_checked"], 2);
    let said = dir.snapback(&["verify", text(&last)]).plain().succeed()?.said;
    assert!(said[0].contains("its 2 parent(s) were not checked"), "{said:?}");

    // One image of all, which needs none of them.
    let flat = dir.path("flat.snap");
    dir.snapback(&["flatten", text(&last), text(&flat)]).succeed()?;
    fs::rename(dir.path("moved/base.snap"), dir.path("away.snap"))?;
    comes_back(dir, &flat, &from, "third", &sum, &shared.nonce)?;

    // Without the first, the last is of no use, and says so.
    let revert = |name: &str| dir.revert(&last, &from, &dir.make(name)?).fail();
    let error = revert("fourth")?;
    let identity = info["layers"][1]["identity"].as_str().unwrap();
    assert!(error.contains("base.snap does not exist") && error.contains(identity), "{error}");
    let said = dir.snapback(&["info", text(&last)]).plain().succeed()?.said.join("\n");
    assert!(said.contains("MISSING") && said.contains(identity), "{said}");
    fs::copy(&flat, dir.path("moved/base.snap"))?;
    let error = revert("fifth")?;
    assert!(error.contains("base.snap is another image"), "{error}");
    assert!(dir.processes().is_empty());
    Ok(())
}

/// The guest comes back from that image with its memory as it was.
fn comes_back(
    dir: &Dir,
    image: &Path,
    from: &Path,
    name: &str,
    sum: &str,
    nonce: &str,
) -> Result<()> {
    let mut guest = dir.reverted(image, from, name)?;
    assert_eq!(guest.oracle.sum()?, sum);
    guest.resident()?;
    guest.check(nonce)
}

fn a_parent_that_can_not_be_is_refused_before_the_guest_is_touched(dir: &Dir) -> Result<()> {
    let guest = crate::shared::borrow(Qemu::V7)?;
    let image = shared(Qemu::V7)?.image.clone();
    fs::write(dir.path("other"), "no image")?;
    let parent = dir.path("parent.snap");
    fs::copy(image, &parent)?;
    for (image, parent, why) in [
        ("vm.snap", dir.path("missing"), "No such file"),
        ("vm.snap", dir.path("other"), "truncated"),
        ("parent.snap", parent, "give it another name"),
    ] {
        let save = dir.save(&guest, image).with(&["--force", "--parent", text(&parent)]);
        let ended = save.end()?;
        let error = ended.failure()?;
        assert!(error.contains(why), "{error}");
        assert_eq!(ended.steps(), ["error"]);
    }
    assert_eq!(dir.names(".")?, ["other", "parent.snap"]);
    Ok(())
}
