//! `info`, `verify` and `working-set`.

use std::path::Path;

use super::events::{CommandEvent, Info, InfoBlock, Layer, Range};
use super::failure::Failure;
use super::output::{Output, print_about, print_line, size};
use super::style::columns;
use crate::image::journeys::{self, VerifyOptions};
use crate::image::{Damage, DamagedRange, Image, ImageError, LayerRef, Overview, inspect};
use crate::kind::ErrorKind;
use crate::machine::DiskRole;
use crate::memory::{WorkingSet, working_set};
use crate::page::{Block, PAGE_SIZE};
use crate::repository::time_text;

/// Columns of what a line of `info` is about.
const ABOUT: usize = 13;

/// Shows what an image holds.
pub(super) fn info(path: &Path, output: &Output) -> Result<(), Failure> {
    let Overview { manifest, file_len, layers } = inspect(path)?;
    if let Some(says) = crate::image::exposure(path) {
        output.warn(says);
    }
    let machine = &manifest.machine;
    let data_bytes = manifest.data_pages * PAGE_SIZE as u64;
    let zero_bytes = manifest.zero_pages * PAGE_SIZE as u64;
    let parent_pages: u64 = manifest.layers.iter().map(|layer| layer.pages).sum();
    let layout = if manifest.flat.is_empty() { "packed" } else { "flat" };
    let ratio = (data_bytes + zero_bytes) as f64 / file_len as f64;
    if output.is_json() {
        let block = |block: &Block| InfoBlock {
            name: block.name.clone(),
            bytes: block.len,
            page_size: block.page_size,
        };
        let machine = machine.clone();
        output.print_json(&CommandEvent::Info(Box::new(Info {
            identity: manifest.identity.to_string(),
            created_by: manifest.created_by.clone(),
            moment_unix_us: manifest.moment_unix_us,
            pause_ms: manifest.pause_us.map(|us| us as f64 / 1e3),
            qemu: machine.qemu.to_string(),
            qemu_package: machine.qemu.package,
            binary: machine.binary,
            machine_type: machine.machine_type,
            running: machine.running,
            command_line: machine.argv,
            working_folder: machine.cwd,
            uncaptured_disks: machine.uncaptured_disks,
            disks: machine.disks,
            hotplug: machine.hotplug,
            libvirt_xml: machine.libvirt_xml,
            libvirt_inactive_xml: machine.libvirt_inactive_xml,
            blocks: manifest.blocks.iter().map(block).collect(),
            layout,
            layers: manifest.layers.iter().zip(&layers).map(layer_event).collect(),
            data_pages: manifest.data_pages,
            parent_pages,
            zero_pages: manifest.zero_pages,
            data_bytes,
            image_bytes: file_len,
            ratio,
        })));
        return Ok(());
    }
    let line = |what: &str, value: &str| print_about(what, ABOUT, value);
    line("image", &path.display().to_string());
    line("identity", &manifest.identity.to_string());
    let pause = match manifest.pause_us {
        Some(us) => format!("the guest stood still for {:.1} ms", us as f64 / 1e3),
        None => "the guest was paused".into(),
    };
    line("moment", &format!("{}; {pause}", utc(manifest.moment_unix_us)));
    let package = match machine.qemu.package.trim() {
        "" => String::new(),
        package => format!(" ({package})"),
    };
    line("qemu", &format!("{}{package}, {}", machine.qemu, machine.binary));
    line("machine", &machine.machine_type);
    for block in &manifest.blocks {
        let page_size = match block.page_size {
            4096 => String::new(),
            other => format!(", in pages of {}", size(other)),
        };
        line("block", &format!("{} {}{page_size}", block.name, size(block.len)));
    }
    line("memory", &format!("{} of data, {} of zeros", size(data_bytes), size(zero_bytes)));
    line("file", &format!("{}, {:.1} % of memory", size(file_len), 100.0 / ratio));
    let to_be_mapped = if layout == "flat" { ", to be mapped (revert --place map)" } else { "" };
    line("layout", &format!("{layout}{to_be_mapped}"));
    for (layer, found) in manifest.layers.iter().zip(&layers) {
        let bytes = size(layer.pages * PAGE_SIZE as u64);
        match found {
            Ok(path) => {
                let identity = layer.identity;
                line("parent", &format!("{bytes} of the data lie in {path} ({identity})"));
            }
            Err(error) => line("parent", &format!("MISSING, with {bytes} of the data: {error}")),
        }
    }
    for disk in &machine.disks {
        let role = match disk.role {
            DiskRole::Captured => "captured",
            DiskRole::ReadOnly => "read-only",
            // Below.
            DiskRole::Excluded => continue,
            DiskRole::Empty => "without a medium",
        };
        let below = match disk.chain.len() {
            0 | 1 => String::new(),
            files => format!(", over {} more", files - 1),
        };
        line("disk", &format!("{}, {}, {role}{below}", disk.describe(), size(disk.size)));
    }
    for disk in &machine.uncaptured_disks {
        line("not included", &format!("writable disk {disk}"));
    }
    for device in &machine.hotplug.added {
        line("plugged in", &device.describe());
    }
    for option in &machine.hotplug.removed {
        line("removed", option);
    }
    for device in &machine.hotplug.missing {
        let device = device.describe();
        line("not included", &format!("device {device}: QEMU has to be given it for a revert"));
    }
    line("started in", &machine.cwd);
    let room = columns().map(|columns| columns.saturating_sub(ABOUT));
    let command = shell_lines(&machine.argv, room).join(&format!("\n{:ABOUT$}", ""));
    print_line(&format!("{:<ABOUT$}{command}", "started as"));
    Ok(())
}

/// A command line to be pasted into a shell: in lines of at most so many characters, unless an argument
/// is longer.
fn shell_lines(argv: &[String], room: Option<usize>) -> Vec<String> {
    const GOES_ON: &str = " \\";
    let mut lines: Vec<String> = Vec::new();
    for argument in argv {
        // No argument of a process has a NUL in it, which is all that can't be quoted.
        let argument = shlex::try_quote(argument).unwrap_or(argument.into());
        let fits = |line: &String| {
            let length = line.chars().count() + 1 + argument.chars().count() + GOES_ON.len();
            room.is_none_or(|room| length <= room)
        };
        match lines.last_mut() {
            Some(line) if fits(line) => *line += &format!(" {argument}"),
            Some(line) => {
                line.push_str(GOES_ON);
                lines.push(argument.into_owned());
            }
            None => lines.push(argument.into_owned()),
        }
    }
    lines
}

fn layer_event((layer, found): (&LayerRef, &Result<String, ImageError>)) -> Layer {
    Layer {
        identity: layer.identity.to_string(),
        path: found.as_ref().ok().cloned(),
        problem: found.as_ref().err().map(|error| error.to_string()),
        relative: layer.relative.clone(),
        absolute: layer.absolute.clone(),
        file_bytes: layer.file_len,
        pages: layer.pages,
    }
}

/// Shows an image's working set.
pub(super) fn working_set(path: &Path, output: &Output) -> Result<(), Failure> {
    let image = Image::open(path)?;
    let manifest = image.manifest();
    let file = working_set::path_for(path);
    let set = WorkingSet::load(&file, image.identity(), &manifest.blocks)?;
    let pages = set.pages.len() as u64;
    let share = pages as f64 / (manifest.data_pages + manifest.zero_pages).max(1) as f64;
    if output.is_json() {
        output.print_json(&CommandEvent::WorkingSet {
            path: file,
            identity: set.identity.to_string(),
            recorded_unix: set.recorded_unix,
            pages,
            share,
        });
        return Ok(());
    }
    let bytes = size(pages * PAGE_SIZE as u64);
    print_line(&format!("working set  {}", file.display()));
    print_line(&format!("recorded     {}", utc(set.recorded_unix.saturating_mul(1_000_000))));
    print_line(&format!("size         {pages} pages, {bytes}, {:.2} % of memory", share * 100.0));
    Ok(())
}

/// Checks every checksum of an image, and with `chain` of those that it refers to.
pub(super) fn verify(path: &Path, chain: bool, output: &Output) -> Result<(), Failure> {
    let others = inspect(path)?.manifest.layers.len();
    let options = VerifyOptions { chain, ..VerifyOptions::new(path) };
    let verified = journeys::verify(&options, |done, total| output.advance_bytes(done, total));
    output.finish_bar();
    let report = verified?;
    if report.is_whole() {
        let checked = if chain { others } else { 0 };
        if output.is_json() {
            output.print_json(&CommandEvent::Verified {
                pages: report.pages,
                chunks: report.chunks,
                parents: others as u64,
                parents_checked: checked as u64,
            });
            return Ok(());
        }
        let parents = match (others, chain) {
            (0, _) => String::new(),
            (count, true) => format!(", {count} parent(s) included"),
            (count, false) => format!("; its {count} parent(s) were not checked (--chain)"),
        };
        print_line(&format!(
            "{} is whole: {} pages in {} chunks{parents}",
            path.display(),
            report.pages,
            report.chunks
        ));
        return Ok(());
    }
    for damage in &report.damages {
        match output.is_json() {
            true => output.print_json(&damage_event(damage)),
            false => print_damage(damage),
        }
    }
    let count = report.damages.len() as u64 + report.more_damages;
    Err(Failure::said(
        ErrorKind::ImageDamaged,
        format!(
            "{} is damaged in {count} place(s): use another image; the rest of it is intact",
            path.display()
        ),
    ))
}

fn print_damage(damage: &Damage) {
    print_line(&damage.error.to_string());
    for DamagedRange { block, offset, len } in &damage.ranges {
        print_line(&format!("    block {block}, offset {offset:#x}: {} lost", size(*len)));
    }
}

fn damage_event(damage: &Damage) -> CommandEvent {
    let range = |range: &DamagedRange| Range {
        block: range.block.clone(),
        offset: range.offset,
        bytes: range.len,
    };
    CommandEvent::Damaged {
        what: damage.error.to_string(),
        ranges: damage.ranges.iter().map(range).collect(),
        bytes: damage.bytes,
    }
}

/// A time in microseconds since 1970, in UTC, by RFC 3339.
fn utc(unix_us: u64) -> String {
    format!("{}Z", time_text(unix_us))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_can_be_pasted_into_a_shell() {
        let argv = ["qemu", "-append", "console=ttyS0 quiet", "-drive", "file=/a b,,c"];
        let lines = |room| shell_lines(&argv.map(String::from), room);
        assert_eq!(lines(None), ["qemu -append 'console=ttyS0 quiet' -drive 'file=/a b,,c'"]);
        let folded = lines(Some(32));
        let expected = ["qemu -append \\", "'console=ttyS0 quiet' -drive \\", "'file=/a b,,c'"];
        assert_eq!(folded, expected);
        assert_eq!(crate::exchange::words(&folded.join("\n   ")).unwrap(), argv);
        assert_eq!(lines(Some(0)).len(), argv.len());
    }

    /// An image can say anything, such as a year that RFC 3339 has no digits for.
    #[test]
    fn any_time_can_be_told() {
        assert_eq!(utc(1_795_651_199_000_000), "2026-11-25T23:59:59Z");
        assert!(utc(u64::MAX).ends_with('Z'));
    }
}
