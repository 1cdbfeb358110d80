//! How the program calls what the library's messages name.
//!
//! The library knows nothing of a command line: its errors and notes name fields of options,
//! and functions, between backticks. Whoever runs the program has flags.

/// What the library's messages name, and what the program calls it.
const NAMES: [(&str, &str); 17] = [
    ("`Compression::Zstd`", "--compress zstd"),
    ("`DiskChoice::None`", "--disks none"),
    ("`RewriteOptions::disks`", "--disk"),
    ("`RewriteOptions::paths`", "--path"),
    ("`RewriteOptions::qemu`", "--qemu"),
    ("`RewriteOptions::qmp`", "--qmp"),
    ("`SaveOptions::bandwidth`", "--bandwidth"),
    ("`SaveOptions::compression`", "--compress"),
    ("`SaveOptions::disks`", "--disks"),
    ("`SaveOptions::exclude_disks`", "--exclude-disk"),
    ("`SaveOptions::force`", "--force"),
    ("`SaveOptions::no_wait`", "--no-wait"),
    ("`SaveOptions::overlay_dir`", "--overlay-dir"),
    ("`SaveOptions::parent`", "--parent"),
    ("`SaveOptions::qmp`", "--qmp"),
    ("`SaveOptions::quiesce`", "--quiesce"),
    ("`recover()`", "`snapback save --recover`"),
];

/// A message of the library in the program's words. Everything that is printed passes through
/// here: no name in [`NAMES`] can be one of a user's, since QEMU's and people's names hold
/// neither `::` nor parentheses.
pub(super) fn with_flags(message: &str) -> String {
    NAMES.iter().fold(message.to_owned(), |text, (name, flag)| text.replace(name, flag))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use clap::CommandFactory;

    use super::*;

    #[test]
    fn fields_become_flags_that_exist() {
        let cli = crate::cli::Cli::command();
        let arguments = cli.get_subcommands().flat_map(|command| command.get_arguments());
        let known: HashSet<&str> = arguments.filter_map(|argument| argument.get_long()).collect();
        for (name, flag) in NAMES {
            let long = flag.split_once("--").map(|(_, long)| long.trim_end_matches('`'));
            let long = long.and_then(|long| long.split(' ').next());
            assert!(long.is_some_and(|long| known.contains(long)), "{name}");
        }
        let message = "leave `disks` out with `SaveOptions::exclude_disks`, or try `recover()`";
        assert_eq!(
            with_flags(message),
            "leave `disks` out with --exclude-disk, or try `snapback save --recover`"
        );
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
}
