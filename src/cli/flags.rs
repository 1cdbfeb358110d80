//! The flags that set the library's options: the library's messages name fields, such as
//! `` `RewriteOptions::paths` ``, and the program prints the flag in their place.

use std::borrow::Cow;

/// A field as messages of the library name it, and what the user of the program gives.
const FLAGS: &[(&str, &str)] = &[
    ("in `ImportOptions::command`", "behind `--` (-- qemu-system-x86_64 ARGS…) or with --command"),
    ("in `ImportOptions::qemu`", "with --qemu"),
    ("`ImportOptions::run`", "--run"),
    ("`ExportOptions::force`", "--force"),
    ("set `RewriteOptions::qmp`", "give --qmp PATH"),
    ("`RewriteOptions::qmp`", "--qmp"),
    ("`RewriteOptions::qemu`", "--qemu"),
    ("`RewriteOptions::paths`", "--path"),
    ("`RewriteOptions::disks`", "--disk"),
    ("`OverlayOptions::directory`", "--overlay-dir"),
    ("`Placement::Auto`", "--place auto"),
    ("`BenchOptions::paths`", "--path"),
    ("`BenchOptions::peers`", "--peers"),
    ("`BenchOptions::extra`", "arguments behind `--`"),
    ("in `Sign::nth`", "with --nth"),
    ("in `Sign::pattern`", "with --sign"),
];

/// The message with flags in place of the fields that it names.
pub(super) fn with_flags(message: &str) -> Cow<'_, str> {
    // All that the program prints comes through here, and little of it names a field.
    if !message.contains("::") {
        return message.into();
    }
    let replace = |text: String, (field, flag): &(&str, &str)| text.replace(field, flag);
    FLAGS.iter().fold(message.to_owned(), replace).into()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn fields_become_flags() {
        let says = with_flags("move it with `RewriteOptions::paths` /a=NEW");
        assert_eq!(says, "move it with --path /a=NEW");
        let says = with_flags("for a control socket set `RewriteOptions::qmp`");
        assert_eq!(says, "for a control socket give --qmp PATH");
        assert_eq!(with_flags("std::io"), "std::io");
    }

    /// Fields that are named in the texts of a file and have no flag.
    fn without_flag(file: &Path) -> Vec<String> {
        let text = fs::read_to_string(file).unwrap();
        let code = text.lines().take_while(|line| !line.contains("#[cfg(test)]"));
        let code = code.map(str::trim).filter(|line| !line.starts_with("//"));
        // A text may go on in the next line.
        let code = code.collect::<Vec<_>>().join("\n").replace("\\\n", "");
        let code = with_flags(&code).into_owned();
        let quoted = code.split('`').skip(1).step_by(2);
        let fields = quoted.filter(|quoted| quoted.contains("Options::"));
        fields.map(|field| format!("{}: {field}", file.display())).collect()
    }

    fn sources(directory: &Path) -> Vec<std::path::PathBuf> {
        let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        entries
            .flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] })
            .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
            .collect()
    }

    #[test]
    fn every_field_that_the_library_names_has_a_flag() {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let files = sources(&src).into_iter().filter(|file| !file.ends_with("flags.rs"));
        let missing: Vec<String> = files.flat_map(|file| without_flag(&file)).collect();
        assert!(missing.is_empty(), "no flag in FLAGS: {missing:#?}");
    }
}
