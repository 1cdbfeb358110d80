//! Signed snapshots in a repository that is not encrypted: what is told from them, where somebody else may
//! write to the store.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use snapback::far::{FarOptions, FarSnapshot};
use snapback::image::verify_chain;
use snapback::repository::Access;
use tempfile::TempDir;

use crate::harness::{Memory, disk, event, events, failure, noise, same, snapback};
use crate::support::{Result, files};

/// Keys as OpenSSL has made them, private and public.
const KEYS: [(&str, &str, &str); 2] = [
    (
        "own",
        "MC4CAQAwBQYDK2VwBCIEIEbl6BeHZ2hlu/zX9PnxUIDFLTtttBOOgYHAzlKjij8s",
        "MCowBQYDK2VwAyEAIfW+rF+S4GtI8SU+MTZ/7UiMpDkT/TFdA20vG0qTSrU=",
    ),
    (
        "other",
        "MC4CAQAwBQYDK2VwBCIEIOia72Clmdoj6oZBbk5IXjVbtVcHFmp4ooo1rXRrzZpF",
        "MCowBQYDK2VwAyEAth/8vyWXN8gE85pC4WVdiK69Ocu2mSitLg8LFjVrfu4=",
    ),
];

const SIGN: [&str; 2] = ["--sign-key", "own.pem"];
const SIGN_OTHER: [&str; 2] = ["--sign-key", "other.pem"];
const TRUST: [&str; 2] = ["--trust-key", "own.pub"];
const TRUST_OTHER: [&str; 2] = ["--trust-key", "other.pub"];

/// What a refused snapshot, a damaged repository and a wrong key end with.
fn untrusted() -> (String, i32) {
    ("snapshot_untrusted".into(), 3)
}

fn damaged() -> (String, i32) {
    ("repository_damaged".into(), 4)
}

fn key_invalid() -> (String, i32) {
    ("key_invalid".into(), 3)
}

/// A repository, and keys.
struct Site(TempDir);

impl Site {
    fn new() -> Result<Site> {
        let site = Site(tempfile::tempdir()?);
        for (name, private, public) in KEYS {
            let pem = |kind: &str, key: &str| {
                format!("-----BEGIN {kind} KEY-----\n{key}\n-----END {kind} KEY-----\n")
            };
            fs::write(site.path(&format!("{name}.pem")), pem("PRIVATE", private))?;
            fs::write(site.path(&format!("{name}.pub")), pem("PUBLIC", public))?;
        }
        site.run(&["init"])?;
        Ok(site)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        self.command_on("repository", args)
    }

    fn command_on(&self, repository: &str, args: &[&str]) -> Command {
        let mut command = snapback(repository, args);
        command.current_dir(self.0.path());
        command
    }

    fn run(&self, args: &[&str]) -> Result<Vec<Value>> {
        events(self.command(args))
    }

    /// How a command ends that is to fail.
    fn fails(&self, args: &[&str], more: &[&str]) -> Result<(String, i32)> {
        failure(self.command(&[args, more].concat()))
    }

    /// The objects whose keys begin so.
    fn objects(&self, under: &str) -> Result<Vec<PathBuf>> {
        files(&self.path("repository").join(under))
    }

    /// Saves a machine, and pushes it.
    fn push(&self, name: &str, seed: u64, sign: &[&str]) -> Result<()> {
        let image = format!("{name}.snap");
        Memory::new(name, seed, 1).save(&self.path(&image), None)?;
        self.run(&[&["push", &image], sign].concat())?;
        Ok(())
    }

    /// The only manifest of a machine: its file, its key and its JSON.
    fn manifest(&self, machine: &str) -> Result<(PathBuf, String, String)> {
        let found = self.objects(&format!("snapshots/{machine}"))?;
        let path = found.first().ok_or("no manifest")?.clone();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let key = format!("snapshots/{machine}/{name}");
        let object = fs::read(&path)?;
        let json = object.get(HEADER..object.len() - SUM).ok_or("no object")?;
        Ok((path, key, String::from_utf8(json.to_vec())?))
    }

    /// Whether an image that is pulled by those who trust is this one.
    fn pulls(&self, machine: &str, image: &str) -> Result<bool> {
        self.run(&[&["pull", machine, "pulled.snap", "--force"][..], &TRUST].concat())?;
        same(&self.path("pulled.snap"), &self.path(image))
    }
}

/// Lengths of an object's header, and of the checksum at its end.
const HEADER: usize = 20;
const SUM: usize = 32;

/// Puts an object, with the header of another one and a checksum that is right.
fn forge(path: &Path, key: &str, like: &Path, body: &[u8]) -> Result<()> {
    let mut object = fs::read(like)?;
    object.truncate(HEADER);
    object[12..].copy_from_slice(&(body.len() as u64).to_le_bytes());
    object.extend(body);
    let (header, body) = object.split_at(HEADER);
    let sum = blake3::Hasher::new().update(header).update(key.as_bytes()).update(body).finalize();
    object.extend(sum.as_bytes());
    fs::create_dir_all(path.parent().ok_or("no folder")?)?;
    Ok(fs::write(path, object)?)
}

#[test]
fn what_is_signed_is_told_from_what_is_not() -> Result<()> {
    let site = Site::new()?;
    site.push("web1", 1, &SIGN)?;
    // Those who trust nobody in particular read it as any other.
    assert_eq!(site.run(&["list"])?.len(), 1);
    assert_eq!(site.run(&[&["list"], &TRUST[..]].concat())?.len(), 1);
    assert_eq!(site.run(&[&["list"], &TRUST_OTHER[..], &TRUST].concat())?.len(), 1);
    assert_eq!(site.fails(&["list"], &TRUST_OTHER)?, untrusted());
    assert!(site.pulls("web1", "web1.snap")?);

    // Signed by nobody, and by somebody else.
    site.push("web2", 2, &[])?;
    site.push("web3", 3, &SIGN_OTHER)?;
    for name in ["web2", "web3"] {
        assert_eq!(site.fails(&["pull", name, "x.snap"], &TRUST)?, untrusted());
        assert!(!site.path("x.snap").exists());
        // It does not stand for one that is signed.
        let image = format!("{name}.snap");
        assert_eq!(site.fails(&["push", &image], &SIGN)?, untrusted());
    }
    assert_eq!(site.run(&[&["list", "web1"], &TRUST[..]].concat())?.len(), 1);
    for command in [
        &["list"][..],
        &["check", "web2", "--here", "--repo", "repository"],
        &["copy", "--from", "repository", "--to", "elsewhere", "web2"],
        &["diff", "web1", "web2"],
        &["drill", "web2"],
        &["forget", "web2"],
        &["forget", "--keep-last", "1"],
        &["pack", "web2", "x.packed"],
        &["prune"],
        &["revert", "web2", "--repo", "repository", "--qmp", "x.sock"],
        &["tag", "web2", "golden"],
    ] {
        if command[0] == "copy" {
            events(site.command_on("elsewhere", &["init"]))?;
        }
        assert_eq!(site.fails(command, &TRUST)?, untrusted(), "{command:?}");
    }
    assert_eq!(site.objects("snapshots")?.len(), 3);
    let check =
        site.command(&[&["check", "--repo", "repository"], &TRUST[..]].concat()).output()?;
    let says = String::from_utf8_lossy(&check.stdout);
    assert_eq!((check.status.code(), says.matches(" is not trusted").count()), (Some(4), 2));
    Ok(())
}

#[test]
fn a_copy_is_signed_anew_or_not_at_all() -> Result<()> {
    let site = Site::new()?;
    site.push("web1", 1, &SIGN)?;
    for (to, sign, outcome) in
        [("unsigned", &[][..], Some(untrusted())), ("signed", &SIGN_OTHER, None)]
    {
        events(site.command_on(to, &["init"]))?;
        let copy = ["copy", "--from", "repository", "--to", to, "web1"];
        site.run(&[&copy, sign, &TRUST].concat())?;
        let packed = format!("{to}.packed");
        site.run(&[&["pack", "web1", &packed], sign, &TRUST].concat())?;
        let list = site.command_on(to, &[&["list"], &TRUST_OTHER[..]].concat());
        let unpack = site.command(&[&["unpack", &packed, "x.snap"], &TRUST_OTHER[..]].concat());
        for read in [list, unpack] {
            match &outcome {
                Some(outcome) => assert_eq!(&failure(read)?, outcome),
                None => drop(events(read)?),
            }
        }
        assert_eq!(failure(site.command_on(to, &[&["list"], &TRUST[..]].concat()))?, untrusted());
    }
    Ok(())
}

#[test]
fn what_is_forged_is_refused_wherever_it_lies() -> Result<()> {
    let site = Site::new()?;
    site.push("web1", 1, &SIGN)?;
    site.push("web2", 2, &[])?;
    let (path, key, json) = site.manifest("web1")?;
    let whole = fs::read(&path)?;
    let list = |machine: &str| site.run(&["list", machine]);

    // Of another host, a later moment, and another machine.
    let host = json.replacen("\"host\":\"", "\"host\":\"x", 1);
    forge(&path, &key, &path, host.as_bytes())?;
    assert_eq!(list("web1")?.len(), 1);
    assert_eq!(site.fails(&["list", "web1"], &TRUST)?, untrusted());
    fs::write(&path, &whole)?;
    for (from, to, machine, old, new) in [
        ("\"machine\":\"web1\"", "\"machine\":\"web9\"", "web9", "web1/", "web9/"),
        (
            "\"moment_unix_us\":1795600000000000",
            "\"moment_unix_us\":1795600000000001",
            "web1",
            "0Z-",
            "1Z-",
        ),
    ] {
        let (moved, elsewhere) = (json.replacen(from, to, 1), key.replacen(old, new, 1));
        assert!(moved != json && elsewhere != key, "{key}: {json}");
        let place = site.path("repository").join(&elsewhere);
        forge(&place, &elsewhere, &path, moved.as_bytes())?;
        assert_eq!(list(machine)?.len(), 1);
        assert_eq!(site.fails(&["list", machine], &TRUST)?, untrusted());
        // As it is, it is none of that name to anybody.
        forge(&place, &elsewhere, &path, json.as_bytes())?;
        assert_eq!(site.fails(&["list", machine], &[])?, damaged());
        fs::remove_file(&place)?;
    }
    // Without its signature, and in another repository.
    let unsigned = json.split(",\"signature\"").next().unwrap_or_default().to_owned() + "}";
    forge(&path, &key, &path, unsigned.as_bytes())?;
    assert_eq!(site.fails(&["pull", "web1", "x.snap"], &TRUST)?, untrusted());
    fs::write(&path, &whole)?;
    assert!(site.pulls("web1", "web1.snap")?);
    let config = site.path("repository/config");
    let own = fs::read(&config)?;
    events(site.command_on("elsewhere", &["init"]))?;
    fs::copy(site.path("elsewhere/config"), &config)?;
    assert_eq!(site.fails(&["pull", "web1", "x.snap"], &TRUST)?, untrusted());
    fs::write(&config, own)?;

    // Another file in the place of its own.
    let manifest: Value = serde_json::from_str(&json)?;
    let map = manifest["files"][0]["map"].as_str().ok_or("no map")?.to_owned();
    let maps = site.objects("maps")?;
    let (own, others): (Vec<_>, Vec<_>) = maps.iter().partition(|path| path.ends_with(&map));
    let (kept, other) = (fs::read(own[0])?, fs::read(others[0])?);
    forge(own[0], &format!("maps/{map}"), others[0], &other[HEADER..other.len() - SUM])?;
    assert_eq!(site.fails(&["pull", "web1", "x.snap"], &TRUST)?, damaged());
    fs::write(own[0], kept)?;
    assert!(!site.path("x.snap").exists());
    Ok(())
}

#[test]
fn altered_data_reaches_nobody_who_trusts_its_signature() -> Result<()> {
    let site = Site::new()?;
    disk(&site.path("disk.raw"), 9)?;
    let mut memory = Memory::new("web1", 1, 1);
    memory.disks.push(site.path("disk.raw"));
    memory.save(&site.path("web1.snap"), None)?;
    site.run(&[&["push", "web1.snap"], &SIGN[..]].concat())?;
    let open = |key: &str, cache: &str| {
        let access = Access::new().with_trust_keys(vec![site.path(key)]);
        let address = site.path("repository").display().to_string().parse()?;
        let mut options = FarOptions::new(address, "web1".parse()?, access);
        (options.cache.directory, options.patience) = (site.path(cache), Duration::ZERO);
        FarSnapshot::open(&options)
    };
    let is_whole = |far: &FarSnapshot| {
        verify_chain(far.image(), |_, _| {}).is_ok_and(|report| report.is_whole())
    };
    // What its disk is read to.
    let export = |far: &FarSnapshot, to: &str| -> Result<bool> {
        let socket = far.serve_disks()?;
        let from = format!("nbd+unix:///{}?socket={}", far.disks()[0].export, socket.display());
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", "raw", &from]).arg(site.path(to));
        Ok(convert.output()?.status.success())
    };
    let far = open("own.pub", "cache")?;
    assert!(is_whole(&far) && export(&far, "whole.raw")?);
    assert!(same(&site.path("whole.raw"), &site.path("disk.raw"))?);
    drop(far);
    let error = open("other.pub", "cache").err().ok_or("it was opened")?;
    assert_eq!(error.kind().code(), untrusted().0);

    for pack in site.objects("packs")? {
        let mut bytes = fs::read(&pack)?;
        bytes.iter_mut().step_by(1000).for_each(|byte| *byte ^= 1);
        fs::write(&pack, bytes)?;
    }
    assert_eq!(site.fails(&["pull", "web1", "x.snap"], &TRUST)?, damaged());
    assert!(!site.path("x.snap").exists());
    let far = open("own.pub", "another cache")?;
    assert!(!is_whole(&far) && !export(&far, "altered.raw")?);
    Ok(())
}

#[test]
fn a_push_that_signs_takes_nobodys_word_for_what_a_parent_consists_of() -> Result<()> {
    let site = Site::new()?;
    let mut memory = Memory::new("web1", 1, 1);
    memory.save(&site.path("parent.snap"), None)?;
    site.run(&["push", "parent.snap"])?;
    // Somebody says that the parent consists of what is another image, and as long.
    site.push("web2", 2, &[])?;
    let (path, key, json) = site.manifest("web1")?;
    let (_, _, other) = site.manifest("web2")?;
    let (mut forged, other): (Value, Value) =
        (serde_json::from_str(&json)?, serde_json::from_str(&other)?);
    assert_eq!(forged["files"][0]["len"], other["files"][0]["len"]);
    forged["files"][0]["map"] = other["files"][0]["map"].clone();
    (forged["packs"], forged["used"]) = (other["packs"].clone(), other["used"].clone());
    forge(&path, &key, &path, forged.to_string().as_bytes())?;

    memory.bytes[..4096].copy_from_slice(&noise(7, 4096));
    memory.moment_unix_us += 1_000_000;
    memory.save(&site.path("child.snap"), Some(&site.path("parent.snap")))?;
    // The parent of this machine can't be read by those who trust; the push goes on without it.
    site.run(&[&["push", "child.snap"], &SIGN[..], &TRUST].concat())?;
    fs::create_dir(site.path("pulled"))?;
    site.run(&[&["pull", "web1", "pulled/child.snap"], &TRUST[..]].concat())?;
    for name in ["child.snap", "parent.snap"] {
        assert!(same(&site.path(name), &site.path("pulled").join(name))?, "{name}");
    }
    Ok(())
}

#[test]
fn a_prune_signs_what_it_puts_anew_and_leaves_what_it_could_not_sign() -> Result<()> {
    let site = Site::new()?;
    for (name, seed, sign) in [("a", 1, &SIGN[..]), ("b", 2, &[]), ("c", 3, &SIGN_OTHER)] {
        let mut memory = Memory::new(name, seed, 4);
        memory.bytes = noise(seed, 4 << 20);
        memory.save(&site.path("first.snap"), None)?;
        site.run(&[&["push", "first.snap"], sign].concat())?;
        memory.bytes[1 << 20..].copy_from_slice(&noise(seed + 10, 3 << 20));
        memory.moment_unix_us += 86_400_000_000;
        let image = format!("{name}.snap");
        memory.save(&site.path(&image), None)?;
        site.run(&[&["push", &image], sign].concat())?;
        site.run(&["forget", &format!("{name}@2026-11-25")])?;
        fs::remove_file(site.path("first.snap"))?;
    }
    // How many packs are repacked, and how many are left for their signatures.
    let prune = |sign: &[&str]| -> Result<(u64, u64)> {
        let pruned = site.run(&[&["prune", "--max-unused", "0%"], sign].concat())?;
        let pruned = event(&pruned, "pruned")?;
        let count = |field: &str| pruned[field].as_u64().ok_or(format!("no {field}"));
        Ok((count("repacked_packs")?, count("signed_packs")?))
    };
    // Of each, one pack is partly unused. What is not signed is put anew as it is.
    assert_eq!(prune(&SIGN_OTHER)?, (2, 1));
    assert_eq!(site.fails(&["list", "b"], &TRUST_OTHER)?, untrusted());
    assert_eq!(site.run(&[&["list", "c"], &TRUST_OTHER[..]].concat())?.len(), 1);
    for sign in [&[][..], &SIGN_OTHER] {
        assert_eq!(prune(sign)?, (0, 1));
    }
    assert_eq!(prune(&SIGN)?, (1, 0));
    assert!(site.pulls("a", "a.snap")?);
    Ok(())
}

#[test]
fn keys_are_settings_too_and_wrong_ones_are_told() -> Result<()> {
    let site = Site::new()?;
    Memory::new("web1", 1, 1).save(&site.path("web1.snap"), None)?;
    fs::write(
        site.path("encrypted.pem"),
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIGj\n-----END ENCRYPTED PRIVATE KEY-----\n",
    )?;
    fs::write(site.path("broken.pem"), "-----BEGIN PRIVATE KEY-----\nMC4C")?;
    for wrong in ["own.pub", "web1.snap", "encrypted.pem", "broken.pem"] {
        assert_eq!(site.fails(&["push", "web1.snap", "--sign-key", wrong], &[])?, key_invalid());
    }
    for wrong in ["own.pem", "web1.snap", "broken.pem"] {
        assert_eq!(site.fails(&["list", "--trust-key", wrong], &[])?, key_invalid());
    }
    assert_eq!(site.fails(&["list", "--trust-key", "absent"], &[])?.0, "not_found");

    let with = |args: &[&str], variables: &[(&str, &str)]| {
        let mut command = site.command(args);
        command.envs(variables.iter().copied());
        command
    };
    let (sign, trust) = (("SNAPBACK_SIGN_KEY", "own.pem"), ("SNAPBACK_TRUST_KEY", "own.pub"));
    // What would be read by none who trusts that key is not put, and not saved for it.
    let refused = ("options_invalid".to_owned(), 3);
    assert_eq!(failure(with(&["push", "web1.snap"], &[trust]))?, refused);
    assert!(!site.path("repository/snapshots").exists());
    let config = "repository = \"repository\"\nspool = \"spool\"\nprune = false\n\
                  [machines.web1]\nqmp = \"/absent/qmp.sock\"\n";
    fs::write(site.path("backup.toml"), config)?;
    let backup = ["backup", "--config", "backup.toml"];
    assert_eq!(failure(with(&backup, &[trust]))?, refused);
    fs::write(site.path("backup.toml"), format!("trust_key = [\"own.pub\"]\n{config}"))?;
    assert_eq!(failure(with(&backup, &[]))?, refused);
    fs::write(site.path("backup.toml"), format!("sign_key = \"own.pub\"\n{config}"))?;
    assert_eq!(failure(with(&backup, &[sign]))?, key_invalid());

    events(with(&["push", "web1.snap"], &[sign, trust]))?;
    assert_eq!(events(with(&["list"], &[trust]))?.len(), 1);
    assert_eq!(failure(with(&["list"], &[("SNAPBACK_TRUST_KEY", "other.pub")]))?, untrusted());
    // What it signs itself it reads, too.
    let prune = ["prune", "--trust-key", "other.pub"];
    assert_eq!(failure(with(&prune, &[]))?, untrusted());
    events(with(&prune, &[sign]))?;
    Ok(())
}
