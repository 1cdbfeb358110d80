//! Log files of serial ports and the like: continued, where QEMU would truncate them.

use std::collections::HashMap;

use crate::guest::command_line::backend;
use crate::guest::command_line::parameters::Params;
use crate::guest::command_line::{Arg, CommandLine, CommandOption};
use crate::guest::start::plan::Note;

/// Has QEMU append to the files that its character backends write.
pub(super) fn append(line: &mut CommandLine, notes: &mut Vec<Note>) {
    const WHY: &str = "it may hold what was logged before; `RewriteOptions::truncate_logs` \
                       has QEMU truncate it";
    let mut counts = HashMap::new();
    let mut args = Vec::with_capacity(line.args.len());
    for arg in std::mem::take(&mut line.args) {
        let Arg::Option(mut option) = arg else {
            args.push(arg);
            continue;
        };
        let count = counts.entry(option.name().to_owned()).or_insert(0_u32);
        let at = *count;
        *count += 1;
        for file in backend::append(&mut option) {
            notes.push(Note::new(format!("{} {file} is appended to", option.flag), WHY));
        }
        let options = match old_file(&option, at) {
            Some((file, options)) => {
                notes.push(Note::new(format!("{} {file} is appended to", option.flag), WHY));
                options
            }
            None => vec![option],
        };
        args.extend(options.into_iter().map(Arg::Option));
    }
    line.args = args;
}

/// `file:PATH`, which can't say that the file is appended to, as a `-chardev` under the label
/// that QEMU gives the backend of the option, the `at`th of its name. `None` for all others.
fn old_file(option: &CommandOption, at: u32) -> Option<(String, Vec<CommandOption>)> {
    let label = match option.name() {
        name @ ("serial" | "parallel") => format!("{name}{at}"),
        "debugcon" => "debugcon".to_owned(),
        _ => return None,
    };
    let (shared, value) = match option.value().strip_prefix("mon:") {
        Some(value) => (true, value),
        None => (false, option.value()),
    };
    // All that follows is the path, commas too.
    let path = value.strip_prefix("file:").filter(|path| !path.starts_with("/dev/"))?;
    let mut backend = Params::parse("file");
    backend.set("id", &label);
    backend.set("path", path);
    backend.set("append", "on");
    if shared {
        backend.set("mux", "on");
    }
    let mut options = vec![
        CommandOption::new("chardev", backend.to_string()),
        CommandOption { value: Some(format!("chardev:{label}")), ..option.clone() },
    ];
    if shared {
        options.push(CommandOption::new("mon", label));
    }
    Some((path.to_owned(), options))
}
