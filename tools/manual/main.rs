//! Writes the manual pages, made of the table of commands and of the documentation: `manual FOLDER`
//! writes them to `man1`, `man5` and `man7` there.

mod commands;
mod roff;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

/// A page made of Markdown.
struct Page {
    name: &'static str,
    section: &'static str,
    about: &'static str,
    source: &'static str,
    /// Other pages.
    also: &'static str,
}

const PAGES: [Page; 5] = [
    Page {
        name: "snapback-image",
        section: "5",
        about: "the format of snapback's images",
        source: "docs/format.md",
        also: "snapback(1), snapback-info(1), snapback-verify(1)",
    },
    Page {
        name: "snapback-pools.toml",
        section: "5",
        about: "configuration of snapback's daemon and its pools",
        source: "docs/pools-toml.md",
        also: "snapback(1), snapback-daemon(1), snapback-pool(1)",
    },
    Page {
        name: "snapback-backup.toml",
        section: "5",
        about: "what snapback backs up",
        source: "docs/backup-toml.md",
        also: "snapback(1), snapback-backup(1)",
    },
    Page {
        name: "snapback-config.toml",
        section: "5",
        about: "settings of snapback",
        source: "docs/configuration.md",
        also: "snapback(1), snapback-config(1)",
    },
    Page {
        name: "snapback-events",
        section: "7",
        about: "events, errors and exit codes of snapback",
        source: "docs/events.md",
        also: "snapback(1), snapback-schema(1)",
    },
];

fn main() -> Result<(), Box<dyn Error>> {
    match std::env::args_os().nth(1) {
        Some(folder) => pages(Path::new(&folder)),
        None => Err("give a folder".into()),
    }
}

fn pages(folder: &Path) -> Result<(), Box<dyn Error>> {
    let path = |name: &str, section: &str| -> Result<PathBuf, Box<dyn Error>> {
        let section_folder = folder.join(format!("man{section}"));
        fs::create_dir_all(&section_folder)?;
        Ok(section_folder.join(format!("{name}.{section}")))
    };
    for (name, text) in commands::manual()? {
        fs::write(path(&name, "1")?, text)?;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for Page { name, section, about, source, also } in PAGES {
        let markdown = fs::read_to_string(root.join(source))?;
        let head = roff::head(name, section, about);
        let body = roff::of_markdown(&markdown);
        fs::write(path(name, section)?, format!("{head}{body}{}", roff::see_also(also)))?;
    }
    Ok(())
}
