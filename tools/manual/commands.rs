//! All commands, as manual pages.

use std::error::Error;

use clap::Command;
use clap_mangen::Man;
use snapback::cli::{command, examples};

use crate::roff;

/// A command and all below it that are shown, each with its words.
fn all(command: &Command, above: &str) -> Vec<(String, Command)> {
    let path = format!("{above}{}", command.get_name());
    let below = command.get_subcommands().filter(|below| !below.is_hide_set());
    let below = below.filter(|below| below.get_name() != "help");
    let below: Vec<_> = below.flat_map(|below| all(below, &format!("{path} "))).collect();
    [(path, command.clone())].into_iter().chain(below).collect()
}

/// The table, built: global options are known to the commands below.
fn table() -> Vec<(String, Command)> {
    let mut root = command().disable_help_subcommand(true);
    root.build();
    all(&root, "")
}

/// The manual pages, by name.
pub fn manual() -> Result<Vec<(String, String)>, Box<dyn Error>> {
    let table = table();
    let names: Vec<String> = table.iter().map(|(path, _)| path.replace(' ', "-")).collect();
    let page = |(path, command): &(String, Command)| -> Result<(String, String), Box<dyn Error>> {
        let name = path.replace(' ', "-");
        let after = command.get_after_help().map(ToString::to_string);
        let man = Man::new(command.clone().display_name(&name)).title(&name).source(roff::SOURCE);
        let mut text = Vec::new();
        man.render_title(&mut text)?;
        man.render_name_section(&mut text)?;
        man.render_synopsis_section(&mut text)?;
        man.render_description_section(&mut text)?;
        man.render_options_section(&mut text)?;
        if command.get_subcommands().any(|below| !below.is_hide_set()) {
            man.render_subcommands_section(&mut text)?;
        }
        let mut text = String::from_utf8(text)?;
        if let Some(after) = after {
            text += &roff::notes(&after);
        }
        text += &roff::examples(examples::of(path));
        if path == "snapback" {
            text += &roff::of_markdown(include_str!("environment.md"));
        }
        text += &roff::see_also(&also(&name, &names));
        Ok((name, text))
    };
    table.iter().map(page).collect()
}

/// The page above, those below, and the pages on what all commands have in common.
fn also(name: &str, names: &[String]) -> String {
    let below = names.iter().filter(|other| {
        let rest = other.strip_prefix(name).and_then(|rest| rest.strip_prefix('-'));
        rest.is_some_and(|rest| name != "snapback" || names.contains(&format!("{name}-{rest}")))
    });
    let above = names.iter().filter(|other| name.starts_with(&format!("{other}-")));
    let mut pages: Vec<String> = above.chain(below).map(|other| format!("{other}(1)")).collect();
    pages.sort();
    let common = ["backup.toml(5)", "config.toml(5)", "image(5)", "pools.toml(5)", "events(7)"];
    pages.extend(common.map(|page| format!("snapback-{page}")));
    pages.join(", ")
}
