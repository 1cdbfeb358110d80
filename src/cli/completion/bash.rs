//! How bash asks.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::Path;

use clap::Command;
use clap_complete::env::{Bash, EnvCompleter};

/// clap's, but for what it has bash do: that takes the words as bash splits them, at the `=` of an option, the
/// `:` of an address and the `@` of a snapshot's name too, and so proposes nothing behind these.
pub(super) struct WholeWords;

impl EnvCompleter for WholeWords {
    fn name(&self) -> &'static str {
        Bash.name()
    }

    fn is(&self, name: &str) -> bool {
        Bash.is(name)
    }

    fn write_registration(
        &self,
        variable: &str,
        _: &str,
        name: &str,
        program: &str,
        script: &mut dyn Write,
    ) -> io::Result<()> {
        let program = shlex::try_quote(program).map_err(io::Error::other)?;
        let text = include_str!("snapback.bash").replace("@VARIABLE@", variable);
        script.write_all(text.replace("@NAME@", name).replace("@PROGRAM@", &program).as_bytes())
    }

    fn write_complete(
        &self,
        command: &mut Command,
        words: Vec<OsString>,
        directory: Option<&Path>,
        answer: &mut dyn Write,
    ) -> io::Result<()> {
        Bash.write_complete(command, words, directory, answer)
    }
}
