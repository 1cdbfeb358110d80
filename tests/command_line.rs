//! What holds for every command: settings, completions, and how much is said.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

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
