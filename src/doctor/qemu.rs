//! The QEMUs of this host, each asked what it can do here, for this user: it is started
//! without a machine, and asked to turn on what a save and a revert turn on.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::unistd::geteuid;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Item, Reverts, State};
use crate::cancel::Cancellation;
use crate::host::program::answer;
use crate::host::rights::userfaultfd_lack;
use crate::machine::QemuVersion;

/// How long a QEMU may take to answer everything.
pub(super) const LIMIT: Duration = Duration::from_secs(10);

/// QEMUs that are asked at the same time.
const AT_ONCE: usize = 4;

/// Where distributions put QEMUs, beside the directories of PATH.
const DIRECTORIES: [&str; 3] = ["/usr/bin", "/usr/local/bin", "/usr/libexec"];

/// What a QEMU can do on this host, for this user.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub struct QemuAbilities {
    /// The program.
    pub path: PathBuf,
    /// Its version, such as `10.0.2`.
    pub version: String,
    /// Whether it saves a guest that runs on (`background-snapshot`).
    pub background_snapshot: bool,
    /// Whether it takes memory while the guest runs (`postcopy-ram`).
    pub postcopy: bool,
    /// Whether it reads and writes files in which each page has its place (`mapped-ram`, 9.0).
    pub mapped_ram: bool,
    /// Whether it maps memory from inside a file, as from a flat image
    /// (`memory-backend-file,offset=`, 8.1).
    pub map: bool,
    /// Whether it takes its userfaultfds from `/dev/userfaultfd` where it may open that (8.0).
    pub userfaultfd_device: bool,
}

impl QemuAbilities {
    /// How it brings a guest back at best.
    pub fn reverts(&self) -> Reverts {
        match (self.postcopy, self.map) {
            (true, _) => Reverts::Instant,
            (false, true) => Reverts::Mapped,
            (false, false) => Reverts::Eager,
        }
    }
}

/// Asks every QEMU that is found.
pub(super) fn examine() -> Vec<Item> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(DIRECTORIES.map(PathBuf::from));
    let found: Vec<PathBuf> = find(directories).into_iter().collect();
    let ask_some = |some: &[PathBuf]| -> Vec<Item> {
        std::thread::scope(|scope| {
            let asked: Vec<_> = some.iter().map(|path| scope.spawn(|| examine_one(path))).collect();
            asked.into_iter().filter_map(|thread| thread.join().ok()).collect()
        })
    };
    match found.is_empty() {
        true => vec![Item::new("qemu", State::Missing, "no qemu-system-* found in PATH")],
        false => found.chunks(AT_ONCE).flat_map(ask_some).collect(),
    }
}

/// The programs in these directories whose names are those of QEMUs, without links to others.
fn find(directories: impl Iterator<Item = PathBuf>) -> BTreeSet<PathBuf> {
    let entries = directories.filter_map(|directory| fs::read_dir(directory).ok()).flatten();
    let is_qemu = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("qemu-system-") || name == "qemu-kvm"
    };
    let runs = |path: &PathBuf| {
        fs::metadata(path)
            .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    let paths = entries.flatten().map(|entry| entry.path()).filter(is_qemu).filter(runs);
    paths.map(|path| fs::canonicalize(&path).unwrap_or(path)).collect()
}

fn examine_one(path: &Path) -> Item {
    let named = path.display();
    let qemu = match ask(path) {
        Ok(qemu) => qemu,
        Err(problem) => return Item::new("qemu", State::Missing, format!("{named}: {problem}")),
    };
    let saves = match qemu.background_snapshot {
        true => "saves",
        false => "can't save",
    };
    let reverts = match qemu.reverts() {
        Reverts::Instant => "reverts at once",
        Reverts::Mapped => "reverts flat images at once, others eagerly",
        _ => "reverts eagerly (all memory first)",
    };
    let maps = if qemu.map && qemu.postcopy { ", can map flat images" } else { "" };
    let (state, remedy) = match qemu.background_snapshot && qemu.postcopy {
        true => (State::Ok, None),
        false => {
            let lack = userfaultfd_lack(geteuid().as_raw(), qemu.userfaultfd_device);
            (State::Degraded, lack.and_then(|lack| lack.remedies.into_iter().next()))
        }
    };
    let says = format!("{named}, {}: {saves}, {reverts}{maps}", qemu.version);
    Item { qemu: Some(qemu), ..Item::new("qemu", state, says).remedied(remedy) }
}

/// Starts a QEMU and asks it.
fn ask(path: &Path) -> Result<QemuAbilities, String> {
    let mut command = Command::new(path);
    command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    // The first of these that it has; without a machine, none of them does anything.
    command.args(["-machine", "none,accel=tcg:qtest:kvm"]);
    command.args(["-incoming", "defer", "-qmp", "stdio"]);
    let answer = answer(command, questions(), LIMIT, &Cancellation::new())
        .map_err(|error| error.to_string())?;
    abilities(path, &String::from_utf8_lossy(&answer.stdout)).ok_or_else(|| {
        let said = String::from_utf8_lossy(&answer.stderr);
        let last = said.lines().last().unwrap_or("it says nothing");
        format!("does not answer ({}): {last}", answer.status)
    })
}

/// What QEMU is told (QEMU's "QMP Reference Manual").
fn questions() -> Vec<u8> {
    let set = |id: &str, name: &str, state: bool| {
        let capabilities = json!([{ "capability": name, "state": state }]);
        let arguments = json!({ "capabilities": capabilities });
        json!({ "execute": "migrate-set-capabilities", "id": id, "arguments": arguments })
    };
    let questions = [
        json!({ "execute": "qmp_capabilities" }),
        json!({ "execute": "query-version", "id": "version" }),
        json!({ "execute": "query-migrate-capabilities", "id": "capabilities" }),
        set("postcopy", "postcopy-ram", true),
        // The other is refused beside it.
        set("off", "postcopy-ram", false),
        set("background-snapshot", "background-snapshot", true),
        json!({ "execute": "qom-list-properties", "id": "backend",
                "arguments": { "typename": "memory-backend-file" } }),
        json!({ "execute": "quit" }),
    ];
    questions.map(|question| format!("{question}\n")).concat().into_bytes()
}

/// The answers in what a QEMU said, by the ids of the questions.
pub(super) fn answers(said: &str) -> HashMap<String, Value> {
    let lines = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let answer =
        |mut line: Value| Some((line["id"].as_str()?.to_owned(), line.get_mut("return")?.take()));
    lines.filter_map(answer).collect()
}

/// Reads the answer to `query-version`.
pub(super) fn version(answer: &Value) -> Option<QemuVersion> {
    let number = |name: &str| u32::try_from(answer["qemu"][name].as_u64()?).ok();
    Some(QemuVersion {
        major: number("major")?,
        minor: number("minor")?,
        micro: number("micro")?,
        package: String::new(),
    })
}

/// Reads the answers; nothing where QEMU has not told its version.
fn abilities(path: &Path, said: &str) -> Option<QemuAbilities> {
    let answers = answers(said);
    let answer = |id: &str| answers.get(id);
    let has = |id: &str, key: &str, name: &str| {
        let list = answer(id).and_then(Value::as_array);
        list.is_some_and(|list| list.iter().any(|entry| entry[key] == name))
    };
    let version = version(answer("version")?)?;
    Some(QemuAbilities {
        path: path.to_owned(),
        version: version.to_string(),
        background_snapshot: answer("background-snapshot").is_some(),
        postcopy: answer("postcopy").is_some(),
        mapped_ram: has("capabilities", "capability", "mapped-ram"),
        map: has("backend", "name", "offset"),
        userfaultfd_device: version.uses_userfaultfd_device(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_say_what_a_qemu_can_do() {
        let said = r#"{"QMP": {"version": {}, "capabilities": []}}
{"return": {}}
{"return": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "id": "version"}
{"return": [{"state": false, "capability": "mapped-ram"}], "id": "capabilities"}
{"id": "postcopy", "error": {"class": "GenericError", "desc": "Postcopy is not supported"}}
{"return": {}, "id": "background-snapshot"}
{"return": [{"name": "offset", "type": "int"}], "id": "backend"}
"#;
        let qemu = abilities(Path::new("/q"), said).unwrap();
        assert_eq!((qemu.version.as_str(), qemu.reverts()), ("10.0.2", Reverts::Mapped));
        assert!(qemu.background_snapshot && qemu.mapped_ram && qemu.map && !qemu.postcopy);
        assert_eq!(abilities(Path::new("/q"), "nonsense\n{\"id\": 1}\n"), None);
    }

    #[test]
    fn what_is_no_qemu_is_told() {
        let item = examine_one(Path::new("/bin/false"));
        assert_eq!(item.state, State::Missing);
        assert!(item.says.starts_with("/bin/false: does not answer"), "{item:?}");
        let none = examine_one(Path::new("/no/such"));
        assert!(none.says.contains("can't be run"), "{none:?}");
    }

    #[test]
    fn links_are_followed_and_other_programs_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for (name, mode) in [("qemu-system-a", 0o755), ("qemu-img", 0o755), ("qemu-kvm", 0o644)] {
            fs::write(path(name), "").unwrap();
            fs::set_permissions(path(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        std::os::unix::fs::symlink("qemu-system-a", path("qemu-system-b")).unwrap();
        let found = find([directory.path().to_owned(), "/no/such".into()].into_iter());
        let expected = fs::canonicalize(path("qemu-system-a")).unwrap();
        assert_eq!(found.into_iter().collect::<Vec<_>>(), [expected]);
    }
}
