//! Snapshots there and back.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::harness::{Memory, Site, disk, event, events, failure, noise, same, snapback};
use crate::support::{Result, files, proxy::Fault};

/// A key of age's, and its public half.
pub const IDENTITY: &str =
    "AGE-SECRET-KEY-1GQ9778VQXMMJVE8SK7J6VT8UJ4HDQAJUVSFCWCM02D8GEWQ72PVQ2Y5J33";
pub const RECIPIENT: &str = "age1t7rxyev2z3rw82stdlrrepyc39nvn86l5078zqkf5uasdy86jp6svpy7pa";

/// A snapshot with a disk, and one on top of it after the guest has gone on.
fn two_snapshots(site: &Site) -> Result<Memory> {
    fs::create_dir(site.path("here"))?;
    disk(&site.path("here/base.raw"), 7)?;
    let mut memory = Memory::new("web1", 1, 12);
    memory.disks = vec![site.path("here/base.raw")];
    memory.save(&site.path("here/mon.snap"), None)?;
    fs::write(site.path("here/mon.snap.ws"), b"a working set, as it were")?;
    memory.bytes[100 << 10..200 << 10].copy_from_slice(&noise(5, 100 << 10));
    memory.moment_unix_us += 86_400_000_000;
    disk(&site.path("here/over.raw"), 7)?;
    memory.disks.insert(0, site.path("here/over.raw"));
    memory.save(&site.path("here/tue.snap"), Some(&site.path("here/mon.snap")))?;
    Ok(memory)
}

/// Pushes both, and brings them back elsewhere.
fn there_and_back(site: &Site, run: &dyn Fn(&[&str]) -> Result<Vec<Value>>) -> Result<()> {
    let pushed = run(&["push", "here/mon.snap", "--tag", "first"])?;
    let first = event(&pushed, "pushed")?;
    let own = first["own_bytes"].as_u64().unwrap_or(0);
    assert_eq!((&first["machine"], &first["disk_files"]), (&"web1".into(), &1.into()));
    assert!((8 << 20..16 << 20).contains(&own), "{own}");
    // What is there is not sent again: the parent, and the disk, which has not changed.
    let pushed = run(&["push", "here/tue.snap"])?;
    let own = event(&pushed, "pushed")?["own_bytes"].as_u64().unwrap_or(0);
    assert!(own < 200 << 10, "{own}");
    assert_eq!(event(&run(&["push", "here/tue.snap"])?, "pushed")?["was_there"], true);

    let listed = run(&["list"])?;
    let names = listed.iter().map(|one| (&one["time"], &one["tags"][0]));
    let moments = ["2026-11-25T09:46:40", "2026-11-26T09:46:40"].map(Value::from);
    let tags = [Value::from("first"), Value::Null];
    assert!(names.eq(moments.iter().zip(&tags)), "{listed:?}");

    let to = |name: &str| format!("{name}/vm.snap");
    for (name, folder, image) in [
        ("web1@latest", "latest", "tue"),
        ("web1@2026-11-25", "day", "mon"),
        ("web1@first", "tag", "mon"),
    ] {
        fs::create_dir(site.path(folder))?;
        let pulled = run(&["pull", name, &to(folder)])?;
        let image_is = site.path(&format!("here/{image}.snap"));
        assert!(same(&site.path(&to(folder)), &image_is)?, "{name}");
        for file in event(&pulled, "pulled")?["files"].as_array().ok_or("no files")? {
            let (was, path) = (file["was"].as_str().unwrap_or(""), file["path"].as_str());
            let path = site.path(path.ok_or("no path")?);
            assert!(same(Path::new(was), &path)?, "{was}");
            assert_eq!(fs::metadata(&path)?.mode() & 0o777, 0o600);
            if file["role"] == "disk" {
                let blocks = fs::metadata(&path)?.blocks() * 512;
                assert!(blocks < 8 << 20, "no holes: {blocks}");
            }
        }
        fs::remove_dir_all(site.path(folder))?;
    }
    let checked = run(&["check", "--repo", "", "--read-data", "100%"]);
    assert!(checked.is_err(), "an empty address is none");
    Ok(())
}

#[test]
fn there_and_back_by_a_directory() -> Result<()> {
    let site = Site::new()?;
    two_snapshots(&site)?;
    let repository = site.path("repository").display().to_string();
    let command = |args: &[&str]| {
        let mut command = snapback(&repository, args);
        command.current_dir(site.folder.path());
        command
    };
    events(command(&["init"]))?;
    assert_eq!(failure(command(&["init"]))?, ("repository_exists".into(), 3));
    there_and_back(&site, &|args| events(command(args)))?;
    let checked = events(command(&["check", "--repo", &repository, "--read-data", "100%"]))?;
    assert_eq!(event(&checked, "repository_checked")?["damages"], 0);
    // What differs is told by what is stored.
    let diff = events(command(&["diff", "web1@first", "web1@latest"]))?;
    let new = diff[0]["new"].as_u64().unwrap_or(0);
    assert!(diff[0]["what"] == "memory" && (100 << 10..300 << 10).contains(&new), "{diff:?}");
    assert_eq!(failure(command(&["pull", "web2@latest"]))?, ("no_such_snapshot".into(), 3));
    assert_eq!(failure(command(&["pull", "web1@2020-01-01"]))?, ("no_such_snapshot".into(), 3));
    assert_eq!(failure(snapback("/nowhere", &["list"]))?, ("no_repository".into(), 3));
    Ok(())
}

#[test]
fn there_and_back_by_s3_with_a_passphrase_and_nothing_readable_in_between() -> Result<()> {
    let site = Site::new()?;
    two_snapshots(&site)?;
    fs::write(site.path("passphrase"), "correct horse\nnot this\n")?;
    let keyed = |args: &[&str]| {
        let mut command = site.snapback(args);
        command.env("SNAPBACK_PASSPHRASE_FILE", "passphrase");
        command
    };
    events(keyed(&["init", "--encrypt"]))?;
    there_and_back(&site, &|args| events(keyed(args)))?;
    let mut wrong = site.snapback(&["list"]);
    wrong.env("SNAPBACK_PASSPHRASE", "another horse");
    assert_eq!(failure(wrong)?, ("key_invalid".into(), 3));
    assert_eq!(failure(site.snapback(&["list"]))?, ("key_invalid".into(), 3));

    let image = fs::read(site.path("here/mon.snap"))?;
    let (piece, disk) = (&image[1 << 20..(1 << 20) + 64], noise(7, 64));
    for file in files(&site.server.objects())? {
        let (bytes, name) = (fs::read(&file)?, file.display().to_string());
        let holds = |piece: &[u8]| bytes.windows(piece.len()).any(|window| window == piece);
        assert!(!name.contains("web1") && !name.contains("first"), "{name}");
        assert!(!holds(b"web1") && !holds(piece) && !holds(&disk[..64]), "{name}");
    }
    // An object in another one's place is not taken for it.
    let maps = files(&site.server.objects().join("site/maps"))?;
    fs::copy(&maps[0], &maps[1])?;
    let mut check = keyed(&["check", "--repo", "s3://snapshots/site"]);
    let output = check.stderr(Stdio::null()).output()?;
    assert_eq!(output.status.code(), Some(4));
    assert!(String::from_utf8_lossy(&output.stdout).contains("repository_damaged"));
    Ok(())
}

#[test]
fn one_repository_goes_into_another_and_into_a_file() -> Result<()> {
    let site = Site::new()?;
    two_snapshots(&site)?;
    let plain = site.path("plain").display().to_string();
    events(snapback(&plain, &["init"]))?;
    for image in ["here/mon.snap", "here/tue.snap"] {
        let image = site.path(image).display().to_string();
        events(snapback(&plain, &["push", &image, "--tag", "kept"]))?;
    }
    // To age recipients, of whom one is here.
    fs::write(site.path("identity"), format!("# an identity\n{IDENTITY}\n"))?;
    let mut init = site.snapback(&["init", "--encrypt-to", RECIPIENT]);
    init.env("SNAPBACK_IDENTITY", "identity");
    events(init)?;
    let mut copy =
        site.snapback(&["copy", "--from", &plain, "--to", "s3://snapshots/site", "--allow-plain"]);
    copy.env("SNAPBACK_IDENTITY", "identity");
    assert_eq!(events(copy)?.iter().filter(|event| event["event"] == "copied").count(), 2);
    let mut pull = site.snapback(&["pull", "web1@kept", "copied.snap"]);
    pull.env("SNAPBACK_IDENTITY", "identity");
    events(pull)?;
    assert!(same(&site.path("copied.snap"), &site.path("here/tue.snap"))?);

    // One file, from an image or from a repository, by its name or by pipes.
    let here = |args: &[&str]| {
        let mut command = snapback(&plain, args);
        command.current_dir(site.folder.path());
        command
    };
    events(here(&["pack", "web1@latest", "a.packed"]))?;
    let mut pack = here(&["pack", "here/tue.snap", "-"]);
    let packed = pack.output()?;
    assert!(packed.status.success(), "{}", String::from_utf8_lossy(&packed.stderr));
    fs::write(site.path("b.packed"), packed.stdout)?;
    for (number, from) in ["a.packed", "b.packed", "-"].iter().enumerate() {
        fs::create_dir(site.path(&format!("out{number}")))?;
        let to = format!("out{number}/vm.snap");
        let mut unpack = here(&["unpack", from, &to]);
        if *from == "-" {
            unpack.stdin(fs::File::open(site.path("a.packed"))?);
        }
        events(unpack)?;
        assert!(same(&site.path(&to), &site.path("here/tue.snap"))?);
        let disk = format!("out{number}/vm.snap.disks/base.raw");
        assert!(same(&site.path(&disk), &site.path("here/base.raw"))?);
    }
    // It is a repository that can only be read.
    let packed = site.path("a.packed").display().to_string();
    assert_eq!(events(snapback(&packed, &["list"]))?.len(), 1);
    let short = fs::read(&packed)?;
    fs::write(&packed, &short[..short.len() - 1000])?;
    assert_eq!(failure(here(&["unpack", "a.packed", "x.snap"]))?, ("input_invalid".into(), 3));
    assert_eq!(failure(here(&["unpack", "here", "x.snap"]))?, ("input_invalid".into(), 3));
    let absent = here(&["unpack", "absent.packed", "x.snap"]).output()?;
    let says = String::from_utf8_lossy(&absent.stdout);
    assert!(says.contains("absent.packed") && !says.contains("repository"), "{says}");
    Ok(())
}

#[test]
fn another_repository_in_its_place_is_not_taken_for_it() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let command = |args: &[&str], keyed: bool| {
        let mut command = snapback("repository", args);
        command.current_dir(folder.path());
        if keyed {
            command.env("SNAPBACK_IDENTITY", "identity");
        }
        command
    };
    fs::write(at("identity"), IDENTITY)?;
    let made = events(command(&["init", "--encrypt-to", RECIPIENT], true))?;
    let fingerprint = made[0]["fingerprint"].as_str().ok_or("no fingerprint")?.to_owned();
    let list = ["list", "--trust", &fingerprint];
    events(command(&list, true))?;
    let untrusted = ("repository_untrusted".to_owned(), 3);
    assert_eq!(failure(command(&["list", "--trust", "another"], true))?, untrusted);

    // Encrypted to the same recipient, with a key of somebody else's.
    fs::rename(at("repository"), at("right"))?;
    events(command(&["init", "--encrypt-to", RECIPIENT], true))?;
    assert_eq!(failure(command(&list, true))?, untrusted);
    let mut variable = command(&["list"], true);
    variable.env("SNAPBACK_TRUST", &fingerprint);
    assert_eq!(failure(variable)?, untrusted);
    events(command(&["list"], true))?;

    // Not encrypted at all.
    fs::rename(at("repository"), at("wrong"))?;
    let refused = ("options_invalid".to_owned(), 3);
    assert_eq!(failure(command(&["init"], true))?, refused);
    assert!(!at("repository").exists());
    let made = events(command(&["init", "--allow-plain"], true))?;
    assert!(made[0]["fingerprint"].is_null());
    fs::remove_dir_all(at("repository"))?;
    let made = events(command(&["init"], false))?;
    assert!(made[0]["fingerprint"].is_null());
    assert_eq!(failure(command(&["list"], true))?, untrusted);
    assert_eq!(failure(command(&list, false))?, untrusted);
    assert_eq!(failure(command(&[&list[..], &["--allow-plain"]].concat(), true))?, untrusted);
    events(command(&["list", "--allow-plain"], true))?;
    events(command(&["list"], false))?;
    // As settings of a file.
    fs::create_dir_all(at("settings/snapback"))?;
    let set = |text: &str| fs::write(at("settings/snapback/config.toml"), text);
    let with_settings = |args: &[&str]| {
        let mut command = command(args, true);
        command.env("XDG_CONFIG_HOME", at("settings"));
        command
    };
    set("allow_plain = true\n")?;
    events(with_settings(&["list"]))?;
    assert_eq!(failure(with_settings(&["list", "--allow-plain=false"]))?, untrusted);
    set(&format!("allow_plain = true\ntrust = \"another,{fingerprint}\"\n"))?;
    assert_eq!(failure(with_settings(&["list"]))?, untrusted);
    let mut show = Command::new(env!("CARGO_BIN_EXE_snapback"));
    show.args(["config", "show", "--json"]).env("XDG_CONFIG_HOME", at("settings"));
    let shown = events(show)?;
    let shown = shown.iter().find(|setting| setting["name"] == "trust").ok_or("no trust")?;
    assert_eq!(shown["value"], format!("another,{fingerprint}"));

    fs::rename(at("repository"), at("plain"))?;
    fs::rename(at("right"), at("repository"))?;
    events(command(&list, true))?;
    events(with_settings(&["list"]))?;
    Ok(())
}

#[test]
fn what_changed_since_the_snapshot_is_refused_and_what_was_altered_there_is_told() -> Result<()> {
    let site = Site::new()?;
    two_snapshots(&site)?;
    events(site.snapback(&["init"]))?;
    events(site.snapback(&["push", "here/mon.snap"]))?;
    // In transit once: it is fetched again.
    site.proxy.fail("GET", "/packs/", 1, Fault::Alter(1000));
    events(site.snapback(&["pull", "web1", "a.snap"]))?;
    assert!(same(&site.path("a.snap"), &site.path("here/mon.snap"))?);
    // For good: it is told, and nothing of that name is made.
    let packs = files(&site.server.objects().join("site/packs"))?;
    let mut bytes = fs::read(&packs[0])?;
    bytes[1000] ^= 1;
    fs::write(&packs[0], bytes)?;
    assert_eq!(
        failure(site.snapback(&["pull", "web1", "b.snap"]))?,
        ("repository_damaged".into(), 4)
    );
    assert!(!site.path("b.snap").exists());
    let check = ["check", "--repo", "s3://snapshots/site", "--read-data", "100%"];
    assert_eq!(failure(site.snapback(&check))?, ("repository_damaged".into(), 4));
    fs::remove_file(&packs[0])?;
    let mut check = site.snapback(&check[..3]);
    let output = check.output()?;
    let says = String::from_utf8_lossy(&output.stdout);
    assert!(says.contains("packs that are not there"), "{says}");
    Ok(())
}
