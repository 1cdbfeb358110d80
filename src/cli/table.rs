//! The table of all commands and arguments, of which help, manual pages, completions and parsing
//! are made.

use clap::{Command, CommandFactory};

use super::{Cli, check, completion, examples};

/// All commands, with their examples and with what completes their arguments.
pub fn command() -> Command {
    // As derived, but for what one struct can't say of two commands.
    let derived = Cli::command().mut_subcommand("check", check::of_repositories_too);
    with_examples(completion::with_completers(derived), "")
}

/// Examples go below the help of each command (`--help`, not `-h`), behind what is there.
fn with_examples(command: Command, above: &str) -> Command {
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
    command.mut_subcommands(|below| with_examples(below, &format!("{path} ")))
}
