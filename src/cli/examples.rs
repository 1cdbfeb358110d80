//! Examples of each command, for its help and its manual page.

/// What is wanted, and the command line for it.
type Example = (&'static str, &'static str);

/// The examples of each command. A test has every line parsed.
const EXAMPLES: &[(&str, &[Example])] = &[
    (
        "snapback",
        &[
            ("Save a guest while it runs", "snapback save --qmp /run/vm/qmp.sock vm.snap"),
            ("Bring it back", "snapback revert vm.snap --qmp /run/vm/new-qmp.sock"),
            ("See what this host can do", "snapback doctor"),
        ],
    ),
    (
        "snapback save",
        &[
            ("Save memory, devices and disks", "snapback save --qmp /run/vm/qmp.sock vm.snap"),
            (
                "Store only what differs from another image",
                "snapback save --qmp /run/vm/qmp.sock --parent vm.snap after-setup.snap",
            ),
            (
                "Save a domain of libvirt's, its file systems frozen by its agent",
                "snapback save --domain web --quiesce auto web.snap",
            ),
            (
                "One from which the guest can be brought back while it is written",
                "snapback save --qmp /run/vm/qmp.sock --followable vm.snap",
            ),
            (
                "See that the new image's guest runs",
                "snapback save --qmp /run/vm/qmp.sock --prove vm.snap",
            ),
            (
                "Save it into a repository, by way of a spool on this host",
                "snapback save --qmp /run/vm/qmp.sock web1 --repo s3://backups/guests",
            ),
            (
                "Clean up behind a save that was killed",
                "snapback save --qmp /run/vm/qmp.sock --recover vm.snap",
            ),
        ],
    ),
    (
        "snapback check",
        &[
            ("Ask whether a save would work", "snapback check --qmp /run/vm/qmp.sock vm.snap"),
            ("The same of a domain of libvirt's", "snapback check --domain web"),
            (
                "Ask whether this host can run the guest of a snapshot",
                "snapback check web1@latest --here --repo s3://backups/guests",
            ),
        ],
    ),
    (
        "snapback revert",
        &[
            (
                "Start the guest, with a control socket of its own",
                "snapback revert vm.snap --qmp /run/vm/new-qmp.sock",
            ),
            (
                "A second one beside it, with other paths and a free port",
                "snapback revert vm.snap --path /run/vm=/run/vm2 --port 2222=auto --detach",
            ),
            (
                "Sixteen clones at once, their disks discarded with them",
                "snapback revert vm.snap --count 16 --ephemeral --detach",
            ),
            (
                "A guest that can be taken back inside its QEMU",
                "snapback revert vm.snap --resettable --detach --qmp /run/vm/new-qmp.sock",
            ),
            (
                "A guest whose image is still being written",
                "snapback revert vm.snap --follow --qmp /run/vm/new-qmp.sock",
            ),
            (
                "Under libvirt, beside the domain that was saved",
                "snapback revert web.snap --domain web --new web-2",
            ),
        ],
    ),
    (
        "snapback fork",
        &[("Two clones of a running guest", "snapback fork --qmp /run/vm/qmp.sock --count 2")],
    ),
    (
        "snapback reset",
        &[
            ("By the id that `snapback ps` shows", "snapback reset 1f0c92ab"),
            ("By its control socket", "snapback reset --qmp /run/vm/new-qmp.sock"),
        ],
    ),
    (
        "snapback serve",
        &[(
            "Bring a guest to a QEMU that waits on a socket",
            "snapback serve vm.snap --to unix:/run/vm/incoming.sock",
        )],
    ),
    (
        "snapback working-set",
        &[
            ("Show what a revert brings first", "snapback working-set vm.snap"),
            (
                "Record it, by a guest that is watched for half a minute",
                "snapback working-set vm.snap --harvest --window 30",
            ),
        ],
    ),
    ("snapback info", &[("Show an image", "snapback info vm.snap")]),
    (
        "snapback export",
        &[
            ("A core file for crash and gdb", "snapback export vm.snap --to elf vm.core"),
            ("A stream for another QEMU, through a pipe", "snapback export vm.snap --to stream -"),
            ("A file for virsh restore", "snapback export web.snap --to libvirt web.save"),
        ],
    ),
    (
        "snapback import",
        &[
            (
                "A migration stream, with the command line of its QEMU",
                "snapback import vm.stream vm.snap -- qemu-system-x86_64 -m 512 -nodefaults",
            ),
            (
                "The same, with the command line of a process as the kernel shows it",
                "snapback import vm.stream vm.snap --command /proc/4242/cmdline",
            ),
        ],
    ),
    (
        "snapback verify",
        &[("Check an image and all its parents", "snapback verify vm.snap --chain")],
    ),
    (
        "snapback flatten",
        &[
            ("Make one image of a chain", "snapback flatten after-setup.snap whole.snap"),
            (
                "An image that guests map and share",
                "snapback flatten vm.snap flat.snap --layout flat",
            ),
        ],
    ),
    (
        "snapback init",
        &[
            ("Make a repository in a bucket", "snapback init --repo s3://backups/guests"),
            (
                "One that is encrypted to a key of age's",
                "snapback init --repo s3://backups/guests --encrypt-to age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p",
            ),
        ],
    ),
    (
        "snapback push",
        &[
            (
                "Put an image and its disks into a repository",
                "snapback push web1.snap --name web1 --repo s3://backups/guests",
            ),
            (
                "Say with it what differs at the other site",
                "snapback push web1.snap --path /run/vm=/srv/vm --netdev lan=bridge,br=dmz --repo s3://backups/guests",
            ),
            (
                "Sign it",
                "snapback push web1.snap --sign-key /etc/snapback/sign.pem --repo s3://backups/guests",
            ),
        ],
    ),
    (
        "snapback pull",
        &[
            (
                "Bring the last snapshot of a machine back as files",
                "snapback pull web1@latest web1.snap --repo s3://backups/guests",
            ),
            (
                "Only if it is signed",
                "snapback pull web1@latest web1.snap --trust-key /etc/snapback/sign.pub --repo s3://backups/guests",
            ),
        ],
    ),
    ("snapback list", &[("List snapshots", "snapback list --repo s3://backups/guests")]),
    (
        "snapback drill",
        &[(
            "See that the last snapshot could be reverted here",
            "snapback drill web1@latest --repo s3://backups/guests",
        )],
    ),
    (
        "snapback backup",
        &[
            ("Back up all machines of /etc/snapback/backup.toml", "snapback backup"),
            ("See whether the file can be understood", "snapback backup --check-config"),
        ],
    ),
    (
        "snapback tag",
        &[("Tag a snapshot", "snapback tag web1@latest before-upgrade --repo s3://backups/guests")],
    ),
    (
        "snapback forget",
        &[(
            "See what would be kept",
            "snapback forget --keep-last 3 --keep-daily 7 --dry-run --repo s3://backups/guests",
        )],
    ),
    (
        "snapback prune",
        &[("Remove what nothing refers to", "snapback prune --repo s3://backups/guests")],
    ),
    (
        "snapback diff",
        &[(
            "Tell how two snapshots differ",
            "snapback diff web1@2026-11-25 web1@latest --repo s3://backups/guests",
        )],
    ),
    (
        "snapback copy",
        &[(
            "Copy a snapshot to another repository",
            "snapback copy web1@latest --from s3://backups/guests --to /mnt/usb",
        )],
    ),
    (
        "snapback pack",
        &[(
            "Put a snapshot into one file",
            "snapback pack web1@latest web1.pack --repo s3://backups/guests",
        )],
    ),
    ("snapback unpack", &[("Bring it back as files", "snapback unpack web1.pack web1.snap")]),
    ("snapback ps", &[("List reverts", "snapback ps")]),
    ("snapback stop", &[("End a guest", "snapback stop 1f0c92ab")]),
    ("snapback logs", &[("Show a server's log", "snapback logs 1f0c92ab")]),
    (
        "snapback gc",
        &[("Remove what killed reverts have left, without being asked", "snapback gc --yes")],
    ),
    (
        "snapback daemon",
        &[
            ("As a service does it", "snapback daemon --config /etc/snapback/pools.toml"),
            (
                "For one user",
                "snapback daemon --listen unix:/run/user/1000/snapback.sock --state /tmp/pools",
            ),
        ],
    ),
    (
        "snapback pool create",
        &[
            ("Four guests wait", "snapback pool create booted vm.snap --armed 4"),
            (
                "Guests that share memory, each with a tap of its own",
                "snapback pool create booted vm.snap --share --netdev net0=tap,ifname=tap{n},script=no",
            ),
        ],
    ),
    ("snapback pool list", &[("Show all pools", "snapback pool list")]),
    ("snapback pool set", &[("Have more guests wait", "snapback pool set booted --armed 8")]),
    ("snapback pool remove", &[("Remove a pool and its guests", "snapback pool remove booted")]),
    ("snapback take", &[("Take a guest under a name", "snapback take booted --name job-17")]),
    ("snapback release", &[("End it", "snapback release job-17")]),
    (
        "snapback schema",
        &[
            ("The schema of a line of --json", "snapback schema"),
            ("The daemon's interface", "snapback schema --openapi"),
        ],
    ),
    ("snapback config show", &[("Settings, and where each comes from", "snapback config show")]),
    ("snapback doctor", &[("Ask this host and its QEMUs", "snapback doctor")]),
    (
        "snapback bench",
        &[
            (
                "Beside QEMU's own ways, with a report",
                "snapback bench vm.snap --runs 20 --peers --report vm.html",
            ),
            (
                "For a comparison, on processors of its own",
                "snapback bench vm.snap --runs 50 --pin 2-5 --save base.json --csv runs.csv",
            ),
            ("What another program has changed", "snapback bench --compare base.json new.json"),
        ],
    ),
    (
        "snapback resume",
        &[(
            "Go on with a guest whose server and keeper were killed",
            "snapback resume vm.snap --pid 4242",
        )],
    ),
];

/// The examples of a command, which is named with those above it.
pub fn of(path: &str) -> &'static [Example] {
    EXAMPLES.iter().find(|(of, _)| *of == path).map_or(&[], |(_, examples)| examples)
}

/// They as the end of a command's help.
pub(super) fn text(path: &str) -> Option<String> {
    let examples = of(path);
    let lines = examples.iter().map(|(wanted, line)| format!("  {wanted}:\n    $ {line}"));
    (!examples.is_empty()).then(|| format!("Examples:\n{}", lines.collect::<Vec<_>>().join("\n")))
}

#[cfg(test)]
mod tests {
    use clap::Command;

    use super::*;

    fn paths(command: &Command, above: &str) -> Vec<String> {
        let path = format!("{above}{}", command.get_name());
        let shown = command.get_subcommands().filter(|below| !below.is_hide_set());
        let below: Vec<String> =
            shown.flat_map(|below| paths(below, &format!("{path} "))).collect();
        match below.is_empty() {
            true => vec![path],
            false => below,
        }
    }

    #[test]
    fn every_command_has_examples_and_all_of_them_parse() {
        let table = crate::cli::command();
        for path in paths(&table, "") {
            assert!(!of(&path).is_empty(), "{path} has no example");
        }
        for (path, examples) in EXAMPLES {
            for (_, line) in *examples {
                assert!(*path == "snapback" || line.starts_with(path), "{path}: {line}");
                let words = shlex::split(line).unwrap();
                let parsed = table.clone().try_get_matches_from(words);
                assert!(parsed.is_ok(), "{line}: {}", parsed.err().unwrap());
            }
        }
    }

    /// The command lines of this program in a page's examples, joined where they go on in the next line.
    fn command_lines(page: &str) -> Vec<String> {
        let fenced = page.split("\n```").skip(1).step_by(2).map(|text| text.replace("\\\n", " "));
        let lines: Vec<String> =
            fenced.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>()).collect();
        let own = lines.iter().map(|line| line.trim_start_matches(['$', '#', ' ']));
        own.filter(|line| line.starts_with("snapback ")).map(str::to_owned).collect()
    }

    #[test]
    fn every_command_line_of_the_documentation_parses() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let docs = std::fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
        let pages = docs.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
        let table = crate::cli::command();
        let (mut seen, mut wrong) = (0, Vec::new());
        for path in pages.chain([root.join("README.md")]) {
            for line in command_lines(&std::fs::read_to_string(&path).unwrap()) {
                // What a reader, or a shell, has to fill in.
                if ["…", "ARGS", "$("].iter().any(|open| line.contains(open)) {
                    continue;
                }
                let words = shlex::split(&line.replace("PID", "4242")).unwrap_or_default();
                // From there on it is the shell's.
                let own = words.iter().take_while(|word| !["|", "&", ">"].contains(&word.as_str()));
                let parsed = table.clone().try_get_matches_from(own);
                let error =
                    parsed.err().map(|error| format!("{}: {line}: {error}", path.display()));
                wrong.extend(error);
                seen += 1;
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        assert!(seen > 100, "{seen}");
    }
}
