//! The table of all commands and arguments, of which help, manual pages, completions and parsing
//! are made.

use std::ffi::OsString;

use clap::{Command, CommandFactory};

use super::{Cli, check, completion, examples};

/// All commands, with their examples and with what completes their arguments.
pub fn command() -> Command {
    with_examples(completion::with_completers(derived()), "", &|_| true)
}

/// The same for a program that was given these arguments: without what completes others, and with the
/// examples that they may ask for. All of it would take longer than whatever else a short command does.
pub(super) fn of_program(arguments: &[OsString]) -> Command {
    let is_given = |word: &str| arguments.iter().any(|argument| argument == word);
    match is_given("--help") || is_given("help") {
        true => with_examples(derived(), "", &is_given),
        false => derived(),
    }
}

/// As derived, but for what one struct can't say of two commands.
pub(super) fn derived() -> Command {
    Cli::command().mut_subcommand("check", check::of_repositories_too)
}

/// Examples go below the help of each command (`--help`, not `-h`), behind what is there: of this one, and
/// of those below it that are wanted by their names.
fn with_examples(command: Command, above: &str, wanted: &dyn Fn(&str) -> bool) -> Command {
    let path = format!("{above}{}", command.get_name());
    let command = match examples::text(&path) {
        None => command,
        Some(examples) => {
            let before = command.get_after_long_help().or(command.get_after_help());
            let help = match before {
                None => examples,
                Some(before) => format!("{before}\n\n{examples}"),
            };
            command.after_long_help(help)
        }
    };
    command.mut_subcommands(|below| match wanted(below.get_name()) {
        true => with_examples(below, &format!("{path} "), wanted),
        false => below,
    })
}
