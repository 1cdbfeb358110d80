//! What holds for every command: settings, completions, and how much is said.

use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

fn snapback() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_snapback"));
    let ours =
        std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SNAPBACK_"));
    for (name, _) in ours {
        command.env_remove(name);
    }
    command
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

fn image() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/0.2.0.snap")
}

#[test]
fn settings_come_from_files_and_variables_and_arguments_go_ahead() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("snapback/config.toml");
    std::fs::create_dir(file.parent().unwrap()).unwrap();
    std::fs::write(&file, "compress = \"none\"\nplace = \"socket\"\n").unwrap();
    let mut command = snapback();
    command.env("XDG_CONFIG_HOME", home.path()).env("SNAPBACK_PLACE", "eager");

    let shown = command.args(["config", "show", "--json"]).output().unwrap();
    let text = String::from_utf8(shown.stdout).unwrap();
    let settings: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let of = |name: &str| settings.iter().find(|setting| setting["name"] == name).unwrap();
    let (compress, place) = (of("compress"), of("place"));
    assert_eq!((&compress["value"], &compress["file"]), (&"none".into(), &file.to_str().into()));
    assert_eq!((&place["value"], &place["variable"]), (&"eager".into(), &"SNAPBACK_PLACE".into()));
    assert_eq!(of("overlay_dir")["value"], Value::Null);

    // The setting is what the command takes.
    let flatten = |more: &[&str]| {
        let to = home.path().join("out.snap");
        let mut command = snapback();
        command.env("XDG_CONFIG_HOME", home.path()).arg("flatten").arg(image()).arg(&to);
        let done = command.arg("--force").args(more).output().unwrap();
        assert!(done.status.success(), "{}", said(&done));
        std::fs::metadata(to).unwrap().len()
    };
    assert!(flatten(&[]) > flatten(&["--compress", "zstd:19"]));

    std::fs::write(&file, "colour = 1\n").unwrap();
    let refused = snapback().env("XDG_CONFIG_HOME", home.path()).arg("doctor").output().unwrap();
    assert_eq!(refused.status.code(), Some(3));
    let said = said(&refused);
    assert!(said.contains("config.toml") && said.contains("no setting colour"), "{said}");
}

#[test]
fn quiet_commands_say_results_alone() {
    let home = tempfile::tempdir().unwrap();
    let flatten = |name: &str, more: &[&str]| {
        let mut command = snapback();
        command.arg("flatten").arg(image()).arg(home.path().join(name)).args(more);
        let done = command.output().unwrap();
        assert!(done.status.success(), "{}", said(&done));
        said(&done)
    };
    assert!(flatten("a.snap", &[]).contains("flattened"));
    assert_eq!(flatten("b.snap", &["--quiet"]), "");
    let verified = snapback().args(["verify", "--quiet"]).arg(image()).output().unwrap();
    assert!(said(&verified).contains("is whole"), "{}", said(&verified));
    let never = snapback().args(["verify", "--color", "always", "/nowhere"]).output().unwrap();
    assert!(said(&never).contains("\u{1b}[31m"), "{}", said(&never));
}

#[test]
fn shells_are_told_what_completes() {
    for (shell, word) in [("bash", "complete"), ("zsh", "compdef"), ("fish", "complete")] {
        let told = snapback().env("COMPLETE", shell).output().unwrap();
        assert!(told.status.success() && said(&told).contains(word), "{}", said(&told));
    }
    assert_eq!(completed(&["verif"], &[]), ["verify"]);
}

/// What a shell is proposed for the last of these words.
fn completed(words: &[&str], variables: &[(&str, &Path)]) -> Vec<String> {
    let mut command = snapback();
    command.env("COMPLETE", "bash").env("_CLAP_IFS", "\n").envs(variables.iter().copied());
    command.env("_CLAP_COMPLETE_INDEX", words.len().to_string());
    let told = command.args(["--", "snapback"]).args(words).output().unwrap();
    // Options are proposed as well.
    let is_value = |line: &&str| !line.starts_with('-');
    said(&told).lines().filter(is_value).map(str::to_owned).collect()
}

#[test]
fn snapshots_of_a_repository_complete() {
    let folder = tempfile::tempdir().unwrap();
    let repository = folder.path().join("repository");
    let run = |words: &[&str]| {
        let done = snapback().args(words).arg("--repo").arg(&repository).output().unwrap();
        assert!(done.status.success(), "{}", said(&done));
    };
    let named = repository.to_str().unwrap();
    assert_eq!(completed(&["pull", "--repo", named, ""], &[]), [""; 0]);
    assert!(!repository.exists());

    run(&["init"]);
    run(&["push", image().to_str().unwrap(), "--name", "web1", "--no-disks"]);
    let proposed = completed(&["pull", "--repo", named, "web"], &[]);
    assert_eq!(proposed.len(), 2, "{proposed:?}");
    assert_eq!(proposed[0], "web1@latest");
    run(&["forget", &proposed[1], "--dry-run"]);
    // By the variable, too, and machines.
    let variables = [("SNAPBACK_REPOSITORY", repository.as_path())];
    assert_eq!(completed(&["diff", "web1@latest", "web"], &variables), proposed);
    assert_eq!(completed(&["list", "w"], &variables), ["web1"]);
}

/// What is proposed, once it is this, or at last: what answers a shell waits a moment only.
fn in_the_end(expected: &[&str], proposed: impl Fn() -> Vec<String>) {
    let begun = Instant::now();
    loop {
        let proposed = proposed();
        if proposed == expected {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{proposed:?}, not {expected:?}");
    }
}

/// What bash has as completions of a line, of which it makes these words. `home` has its programs in `bin`.
fn completed_by_bash(home: &Path, line: &str, words: &[&str]) -> Vec<String> {
    let last = words.last().filter(|last| !["=", ":", "@"].contains(last)).unwrap_or(&"");
    let script = "source <(COMPLETE=bash snapback) && current=$1 COMP_LINE=$2 COMP_POINT=${#2} &&
        COMP_WORDS=(\"${@:3}\") COMP_CWORD=$(($# - 3)) && _snapback snapback \"$current\"
        printf '%s\\n' \"${COMPREPLY[@]}\"";
    let mut bash = Command::new("bash");
    let path = std::env::var("PATH").unwrap();
    bash.env("PATH", format!("{}:{path}", home.join("bin").display())).env("HOME", home);
    bash.env_remove("SNAPBACK_REPOSITORY").env("SNAPBACK_SOCKET", home.join("daemon.sock"));
    bash.env("XDG_RUNTIME_DIR", home).env("XDG_CONFIG_HOME", home).current_dir(home);
    let told = bash.args(["-c", script, "bash", last, line]).args(words).output().unwrap();
    said(&told).lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

fn home_with_program() -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    std::fs::create_dir(home.path().join("bin")).unwrap();
    let program = env!("CARGO_BIN_EXE_snapback");
    std::os::unix::fs::symlink(program, home.path().join("bin/snapback")).unwrap();
    home
}

#[test]
fn bash_completes_words_that_it_splits() {
    let home = home_with_program();
    let there = |line: &str, words: &[&str]| completed_by_bash(home.path(), line, words);
    for name in ["vm.snap", "my vm.snap", "vm.log"] {
        std::fs::write(home.path().join(name), "").unwrap();
    }
    assert_eq!(there("snapback verif", &["snapback", "verif"]), ["verify"]);
    assert_eq!(there("snapback verify  v", &["snapback", "verify", "v"]), ["vm.snap"]);
    assert_eq!(there("snapback verify ~/v", &["snapback", "verify", "~/v"]), ["~/vm.snap"]);
    let quoted = ["snapback", "verify", "my\\ v"];
    assert_eq!(there("snapback verify my\\ v", &quoted), ["my vm.snap"]);

    let place = ["snapback", "serve", "--place", "=", "so"];
    assert_eq!(there("snapback serve --place=so", &place), ["socket"]);
    assert!(there("snapback serve --place=", &place[..4]).contains(&"uffd".to_owned()));
    let far = ["snapback", "pull", "--repo", "s3", ":", "//bucket", "--store-ti"];
    assert_eq!(there("snapback pull --repo s3://bucket --store-ti", &far), ["--store-timeout"]);

    let run = |words: &[&str]| {
        let done = snapback().current_dir(home.path()).args(words).output().unwrap();
        assert!(done.status.success(), "{}", said(&done));
    };
    run(&["init", "--repo", "repository"]);
    let (image, repo) = (image(), "--repo=repository");
    run(&["push", image.to_str().unwrap(), "--name", "web1", "--no-disks", repo]);
    assert_eq!(
        there("snapback list --repo r", &["snapback", "list", "--repo", "r"]),
        ["repository/"]
    );
    let line = "snapback revert --repo=repository web1@l";
    let words = ["snapback", "revert", "--repo", "=", "repository", "web1", "@", "l"];
    in_the_end(&["latest"], || there(line, &words));
    // With bash-completion, bash does not split at @.
    in_the_end(&["web1@latest"], || there(line, &[&words[..5], &["web1@l"]].concat()));
}

/// Ends with its test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

#[test]
fn pools_ids_domains_and_machines_complete() {
    let home = home_with_program();
    let there = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        completed_by_bash(home.path(), line, &words)
    };
    assert_eq!(there("snapback take b"), [""; 0]);

    let mut daemon = snapback();
    let socket = home.path().join("daemon.sock");
    daemon.env("XDG_RUNTIME_DIR", home.path()).args(["daemon", "--no-keeper", "--state"]);
    daemon.arg(home.path().join("state")).arg("--listen");
    daemon.arg(format!("unix:{}", socket.display())).stdout(Stdio::null());
    let _daemon = Daemon(daemon.spawn().unwrap());
    let create = || {
        let mut create = snapback();
        create.args(["pool", "create", "booted"]).arg(image()).args(["--armed", "0", "--socket"]);
        create.arg(&socket).output().unwrap()
    };
    let begun = Instant::now();
    loop {
        let created = create();
        if created.status.success() {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{}", said(&created));
    }
    for line in ["snapback take b", "snapback pool set b", "snapback pool remove b"] {
        in_the_end(&["booted"], || there(line));
    }
    let elsewhere = format!("snapback take --socket {} b", home.path().join("none").display());
    assert_eq!(there(&elsewhere), [""; 0]);

    // A revert, as far as its record tells.
    let run = home.path().join("snapback/1f0c92ab");
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&run).unwrap();
    let record = serde_json::json!({
        "image": "/vm.snap", "begun_unix_ms": 1, "pages": 1, "server": null, "qemu": null, "keeper": null,
        "way": null, "resident": false, "overlays": [], "sockets": [], "log": null,
    });
    std::fs::write(run.join("state.json"), record.to_string()).unwrap();
    in_the_end(&["1f0c92ab"], || there("snapback stop 1"));

    let virsh = home.path().join("bin/virsh");
    let names = "#!/bin/sh\ncase \"$*\" in *--connect=test:*) echo far1 ;; *) echo web1; echo db1 ;; esac\n";
    std::fs::write(&virsh, names).unwrap();
    std::fs::set_permissions(&virsh, std::fs::Permissions::from_mode(0o755)).unwrap();
    in_the_end(&["web1", "db1"], || there("snapback save --domain "));
    in_the_end(&["far1"], || there("snapback save --connect test:///default --domain "));

    let config = "repository = \"/r\"\n[machines.web1]\nqmp = \"/q\"\n";
    std::fs::write(home.path().join("backup.toml"), config).unwrap();
    assert_eq!(there("snapback backup --config backup.toml w"), ["web1"]);
}
