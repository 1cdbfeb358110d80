//! `snapback config`: the settings that are made.

use clap::{Args, Subcommand};

use super::events::CommandEvent;
use super::failure::Failure;
use super::output::{Output, print_line, print_table};
use super::settings::{self, Origin, SETTINGS, Settings};

#[derive(Args)]
pub(super) struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Show all settings, and where each value comes from
    Show {
        /// Print one JSON object a line
        #[arg(long)]
        json: bool,
    },
}

impl ConfigArgs {
    pub fn json(&self) -> bool {
        let ConfigCommand::Show { json } = self.command;
        json
    }
}

/// Runs the command.
pub(super) fn run(args: ConfigArgs, settings: &Settings) -> Result<(), Failure> {
    let output = Output::new(args.json());
    if output.is_json() {
        for setting in SETTINGS {
            let (value, origin) = settings.get(setting.key).cloned().unzip();
            let (file, variable) = match origin {
                None => (None, None),
                Some(Origin::File(path)) => (Some(path), None),
                Some(Origin::Variable(name)) => (None, Some(name)),
            };
            output.print_json(&CommandEvent::Setting { name: setting.key, value, file, variable });
        }
        return Ok(());
    }
    let rows = SETTINGS.iter().map(|setting| {
        let (value, origin) = match settings.get(setting.key) {
            Some((value, origin)) => (value.clone(), origin.to_string()),
            None => ("-".into(), "default".into()),
        };
        [setting.key.to_owned(), value, origin, setting.about.to_owned()]
    });
    print_table(["SETTING", "VALUE", "FROM", "WHAT"], &rows.collect::<Vec<_>>());
    print_line("");
    for file in settings::files() {
        let state = if file.exists() { "read" } else { "not there" };
        print_line(&format!("{} ({state})", file.display()));
    }
    Ok(())
}
