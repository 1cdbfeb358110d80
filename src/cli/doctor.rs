//! `snapback doctor`: what this host and its QEMUs can do.

use clap::Args;

use super::events::CommandEvent;
use super::failure::Failure;
use super::output::{Output, print_line};
use super::style::{columns, wrap};
use crate::doctor::{Diagnosis, Item, Reverts, State, examine};
use crate::kind::ErrorKind;

/// Columns of the table at most, and where its text begins.
const COLUMNS: usize = 100;
const INDENT: usize = 28;

#[derive(Args)]
pub(super) struct DoctorArgs {
    /// Print one JSON object a line
    #[arg(long)]
    pub(super) json: bool,
}

/// Runs the command: prints every item, and fails where no guest can be saved or none be
/// reverted.
pub(super) async fn run(args: DoctorArgs) -> Result<(), Failure> {
    let output = Output::new(args.json);
    let waiting = output.waiting("asking this host and its QEMUs");
    let examined = tokio::task::spawn_blocking(examine).await;
    drop(waiting);
    let Diagnosis { items, save, revert, .. } =
        examined.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()));
    for item in &items {
        match args.json {
            true => output.print_json(&CommandEvent::Doctor(Box::new(item.clone()))),
            false => row(item).iter().for_each(|line| print_line(line)),
        }
    }
    if args.json {
        output.print_json(&CommandEvent::Diagnosis { save, revert });
    }
    let reverts = match revert {
        Reverts::Instant => "guests are reverted at once",
        Reverts::Mapped => "guests are reverted at once from flat images, else eagerly",
        Reverts::Eager => "guests are reverted eagerly, all memory first",
        _ => {
            let message = "no QEMU was found that could revert a guest".into();
            return Err(Failure::said(ErrorKind::HostUnsupported, message));
        }
    };
    match save {
        true => {
            if !args.json {
                print_line(&format!("\nGuests can be saved while they run; {reverts}."));
            }
            Ok(())
        }
        false => {
            let message = format!("no guest can be saved here by this user; {reverts}");
            Err(Failure::said(ErrorKind::HostUnsupported, message))
        }
    }
}

/// The lines of an item.
fn row(item: &Item) -> Vec<String> {
    let state = match item.state {
        State::Ok => "ok",
        State::Degraded => "degraded",
        _ => "MISSING",
    };
    let columns = columns().unwrap_or(80).clamp(INDENT + 20, COLUMNS);
    let mut lines = wrap(&item.says, columns - INDENT);
    // A command stays in one line, to be pasted.
    lines.extend(item.remedy.as_ref().map(|remedy| format!("remedy: `{remedy}`")));
    let head = |number: usize| match number {
        0 => format!("{state:<10}{:<18}", item.name),
        _ => " ".repeat(INDENT),
    };
    lines.iter().enumerate().map(|(number, line)| head(number) + line).collect()
}
