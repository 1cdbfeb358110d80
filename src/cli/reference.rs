//! All commands as a page of the documentation, which a test holds against the table.

use std::fmt::Write;

use clap::Command;

use super::examples;

/// A command and all below it that are shown, each with its words.
fn all(command: &Command, above: &str) -> Vec<(String, Command)> {
    let path = format!("{above}{}", command.get_name());
    let below = command.get_subcommands().filter(|below| !below.is_hide_set());
    let below: Vec<_> = below.flat_map(|below| all(below, &format!("{path} "))).collect();
    [(path, command.clone())].into_iter().chain(below).collect()
}

fn markdown() -> String {
    // Whatever terminal this runs in.
    let mut table = super::command().disable_help_subcommand(true).term_width(90);
    table.build();
    let mut text =
        "# Commands\n\nMade of the program's own table of arguments: `snapback COMMAND --help` \
                    and `man snapback-COMMAND` say the same.\n"
            .to_owned();
    for (path, mut command) in all(&table, "") {
        let about = command.get_about().map(ToString::to_string).unwrap_or_default();
        let help = command.render_help().to_string();
        let usage = help.split_once("Usage:").map_or("", |(_, usage)| usage).trim_end();
        write!(text, "\n## {path}\n\n{about}.\n\n```text\nUsage:{usage}\n```\n").unwrap();
        for (wanted, line) in examples::of(&path) {
            write!(text, "\n{wanted}:\n\n```\n$ {line}\n```\n").unwrap();
        }
    }
    text
}

/// With SNAPBACK_WRITE_SCHEMA set, writes it anew.
#[test]
fn the_page_of_all_commands_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/commands.md");
    if std::env::var_os("SNAPBACK_WRITE_SCHEMA").is_some() {
        std::fs::write(path, markdown()).unwrap();
    }
    let current = std::fs::read_to_string(path).unwrap_or_default();
    assert!(current == markdown(), "run SNAPBACK_WRITE_SCHEMA=1 cargo test --lib cli::");
}
