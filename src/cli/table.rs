//! The table of all commands and arguments, of which help, manual pages, completions and parsing
//! are made.

use std::ffi::OsString;

use clap::builder::StyledStr;
use clap::{Command, CommandFactory};

use super::{Cli, check, examples};

/// All commands, with their examples.
pub fn command() -> Command {
    with_examples(derived(), "", &|_| true)
}

/// The same for a program that was given these arguments, with the examples that they may ask for. All of
/// them would take longer than whatever else a short command does.
pub(super) fn of_program(arguments: &[OsString]) -> Command {
    let is_given = |word: &str| arguments.iter().any(|argument| argument == word);
    match is_given("--help") || is_given("-h") || is_given("help") {
        true => with_examples(derived(), "", &is_given),
        false => derived(),
    }
}

/// As derived, but for what one struct can't say of two commands.
pub(super) fn derived() -> Command {
    Cli::command().mut_subcommand("check", check::of_repositories_too)
}

/// What stands for a clone's number.
const NUMBER: &str = "{n}";

/// The same for clap's help, which breaks a line in the place of `{n}`: not of this, in which a sequence of the
/// terminal's that changes nothing stands, and that clap leaves out of everything but a terminal.
fn literal(help: &str) -> String {
    help.replace(NUMBER, "{\u{1b}[0mn}")
}

/// `{n}` stays as it is in help, and examples go below that of each command (`--help`, not `-h`), behind what
/// is there: of this command, and of those below it that are wanted by their names.
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
            command.after_long_help(literal(&help))
        }
    };
    let command = command.mut_args(|arg| {
        let said = |help: Option<&StyledStr>| {
            let help = help.map(StyledStr::to_string).filter(|help| help.contains(NUMBER));
            help.map(|help| literal(&help))
        };
        let (short, long) = (said(arg.get_help()), said(arg.get_long_help()));
        let arg = short.into_iter().fold(arg, clap::Arg::help);
        long.into_iter().fold(arg, clap::Arg::long_help)
    });
    command.mut_subcommands(|below| match wanted(below.get_name()) {
        true => with_examples(below, &format!("{path} "), wanted),
        false => below,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_a_clone_is_no_line_break_in_help() {
        for words in [&["snapback", "revert", "-h"][..], &["snapback", "pool", "create", "--help"]]
        {
            let arguments: Vec<OsString> = words.iter().map(OsString::from).collect();
            let help = of_program(&arguments).try_get_matches_from(arguments).unwrap_err();
            assert!(help.to_string().contains(NUMBER), "{help}");
        }
        let mut table = command();
        let create = table.find_subcommand_mut("pool").unwrap().find_subcommand_mut("create");
        let help = create.unwrap().render_long_help().to_string();
        assert!(help.contains("ifname=tap{n},script=no"), "{help}");
    }
}
