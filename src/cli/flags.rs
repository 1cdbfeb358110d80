//! How the program calls what the library's messages name.
//!
//! The library knows nothing of a command line: its errors and notes name fields of options,
//! and functions, between backticks, such as `` `RewriteOptions::paths` ``. Whoever runs the
//! program has flags. Everything that the program prints passes through here.

/// What the library's messages name, and what the program calls it. Longer texts come before
/// the names that they hold.
const NAMES: &[(&str, &str)] = &[
    ("in `ImportOptions::command`", "behind `--` (-- qemu-system-x86_64 ARGS…) or with --command"),
    ("in `ImportOptions::qemu`", "with --qemu"),
    ("`ImportOptions::run`", "--run"),
    ("`ExportOptions::force`", "--force"),
    ("set `RewriteOptions::qmp`", "give --qmp PATH"),
    ("`RewriteOptions::qmp`", "--qmp"),
    ("`RewriteOptions::qemu`", "--qemu"),
    ("`RewriteOptions::paths`", "--path"),
    ("`RewriteOptions::ports`", "--port"),
    ("`RewriteOptions::new_generation`", "--vmgenid new"),
    ("`RewriteOptions::own`", "--dir"),
    ("`RewriteOptions::netdevs`", "--netdev"),
    ("`RewriteOptions::truncate_logs`", "--truncate-logs"),
    ("in `RewriteOptions::extra`", "behind `--`"),
    ("`RewriteOptions::disks`", "--disk"),
    ("`OverlayOptions::directory`", "--overlay-dir"),
    ("`RevertOptions::domain`", "--domain"),
    ("`RevertOptions::follow`", "--follow"),
    ("`SaveOptions::followable`", "--followable"),
    ("`RevertOptions::resettable`", "--resettable"),
    ("`SaveOptions::resettable`", "--resettable"),
    ("`DaemonConfig::token_file`", "--token-file"),
    ("`DaemonOptions::listen`", "--listen"),
    ("`PoolsOptions::state`", "--state"),
    ("`DomainOptions::sibling`", "--new"),
    ("`DomainOptions::replace`", "--replace"),
    ("by `Orphan::Qmp`", "by --qmp"),
    ("`Placement::Auto`", "--place auto"),
    ("`Placement::Eager`", "--place eager"),
    ("`AgentOptions::new_macs`", "--mac new"),
    ("`AgentOptions::socket`", "--agent"),
    ("`BenchOptions::paths`", "--path"),
    ("`BenchOptions::peers`", "--peers"),
    ("in `Sign::nth`", "with --nth"),
    ("in `Sign::pattern`", "with --sign"),
    ("`Compression::Zstd`", "--compress zstd"),
    ("`DiskChoice::None`", "--disks none"),
    ("`DiskChoice::Copy`", "--disks copy"),
    ("`DiskChoice::Overlay`", "--disks overlay"),
    ("`SaveOptions::allow_missing_devices`", "--allow-missing-device"),
    ("`SaveOptions::bandwidth`", "--bandwidth"),
    ("`SaveOptions::compression`", "--compress"),
    ("`SaveOptions::disks`", "--disks"),
    ("`SaveOptions::exclude_disks`", "--exclude-disk"),
    ("`SaveOptions::force`", "--force"),
    ("`SaveOptions::no_wait`", "--no-wait"),
    ("`SaveOptions::overlay_dir`", "--overlay-dir"),
    ("`SaveOptions::parent`", "--parent"),
    ("where `SaveOptions::guest` is a domain", "with --domain"),
    ("`SaveOptions::guest`", "--qmp or --domain"),
    ("`SaveOptions::quiesce`", "--quiesce"),
    ("`PushOptions::machine`", "--name"),
    ("set `ForgetOptions::retention`", "give --keep-last or --keep-daily and the like"),
    ("`Access::keys`", "--identity, --passphrase-file or --passphrase-command"),
    ("set `Recipients::to`", "give --encrypt-to RECIPIENT or --encrypt"),
    ("`Access::with_plain`", "--allow-plain"),
    ("set `Access::sign_key`", "give --sign-key FILE"),
    ("`init()`", "`snapback init --repo`"),
    ("`recover()`", "`snapback save --recover`"),
];

/// The message with flags in place of the names in it. None of them can be one of a user's:
/// QEMU's and people's names hold neither `::` nor parentheses.
pub(super) fn with_flags(message: &str) -> String {
    let replace = |text: String, (name, flag): &(&str, &str)| text.replace(name, flag);
    NAMES.iter().fold(message.to_owned(), replace)
}

/// The field that a flag sets.
pub(super) fn field_of(flag: &str) -> Option<String> {
    let (name, _) = NAMES.iter().find(|(name, known)| *known == flag && name.starts_with('`'))?;
    Some(name.trim_matches('`').to_owned())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::*;

    #[test]
    fn the_flags_exist() {
        let cli = crate::cli::command();
        let arguments = cli.get_subcommands().flat_map(|command| command.get_arguments());
        let known: HashSet<&str> = arguments.filter_map(|argument| argument.get_long()).collect();
        for (name, flag) in NAMES {
            let words = flag.split(' ').map(|word| word.trim_matches(['`', ',']));
            let mut longs = words.filter_map(|word| word.strip_prefix("--"));
            // `--` itself ends the flags.
            let exists = |long: &str| long.is_empty() || known.contains(long);
            assert!(longs.any(exists), "{name}: {flag}");
        }
    }

    #[test]
    fn what_a_save_asks_for_is_said_in_flags() {
        use crate::save::{CheckError, LeftOver};
        let errors = [
            CheckError::Incomplete("postcopy-active".into()).to_string(),
            CheckError::NoSuchDisk { name: "vdb".into(), disks: vec!["vda".into()] }.to_string(),
            CheckError::Disk { disk: "vda".into(), problem: "of no file".into() }.to_string(),
            LeftOver::Frozen(None).to_string(),
        ];
        for (error, flag) in
            errors.iter().zip(["--no-wait", "--exclude-disk", "--disks none", "--recover"])
        {
            let said = with_flags(error);
            assert!(said.contains(flag) && !said.contains("::"), "{said}");
        }
    }

    #[test]
    fn fields_become_flags() {
        let message = "leave `disks` out with `SaveOptions::exclude_disks`, or try `recover()`";
        assert_eq!(
            with_flags(message),
            "leave `disks` out with --exclude-disk, or try `snapback save --recover`"
        );
        let says = with_flags("move it with `RewriteOptions::paths` /a=NEW");
        assert_eq!(says, "move it with --path /a=NEW");
        let says = with_flags("for a control socket set `RewriteOptions::qmp`");
        assert_eq!(says, "for a control socket give --qmp PATH");
        assert_eq!(with_flags("std::io"), "std::io");
    }

    /// Fields that are named in the texts of a file and have no flag.
    fn without_flag(file: &Path) -> Vec<String> {
        let text = fs::read_to_string(file).unwrap();
        let code = text.lines().take_while(|line| !line.contains("#[cfg(test)]"));
        let code = code.map(str::trim).filter(|line| !line.starts_with("//"));
        // A text may go on in the next line.
        let code = code.collect::<Vec<_>>().join("\n").replace("\\\n", "");
        let code = with_flags(&code);
        let quoted = code.split('`').skip(1).step_by(2);
        let fields = quoted.filter(|quoted| quoted.contains("Options::"));
        fields.map(|field| format!("{}: {field}", file.display())).collect()
    }

    fn sources(directory: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        entries
            .flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] })
            .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
            .collect()
    }

    #[test]
    fn every_field_that_the_library_names_has_a_flag() {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let files = sources(&src).into_iter().filter(|file| !file.ends_with("flags.rs"));
        let missing: Vec<String> = files.flat_map(|file| without_flag(&file)).collect();
        assert!(missing.is_empty(), "no flag in NAMES: {missing:#?}");
    }
}
