//! How words are shown on a terminal: colours, width, and how many of them.

use std::io::{IsTerminal, stderr, stdout};
use std::sync::OnceLock;

use clap::ValueEnum;

/// Whether words are coloured.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, ValueEnum)]
pub(super) enum Colour {
    /// On a terminal, unless NO_COLOR is set or TERM is dumb
    #[default]
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

/// What was asked for.
static WANTED: OnceLock<(Colour, bool)> = OnceLock::new();

/// Sets, once, how everything is shown from now on.
pub(super) fn set_up(colour: Colour, quiet: bool) {
    let _ = WANTED.set((colour, quiet));
}

fn wanted() -> (Colour, bool) {
    WANTED.get().copied().unwrap_or_default()
}

/// Whether only results, warnings and errors are printed.
pub(super) fn is_quiet() -> bool {
    wanted().1
}

/// Where words go.
#[derive(Clone, Copy)]
pub(super) enum Stream {
    Out,
    Error,
}

impl Stream {
    fn is_terminal(self) -> bool {
        match self {
            Stream::Out => stdout().is_terminal(),
            Stream::Error => stderr().is_terminal(),
        }
    }

    fn is_coloured(self) -> bool {
        match wanted().0 {
            Colour::Always => true,
            Colour::Never => false,
            Colour::Auto => {
                let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
                let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
                self.is_terminal() && !dumb && !set("NO_COLOR")
            }
        }
    }
}

/// What words are about.
#[derive(Clone, Copy)]
pub(super) enum Tone {
    /// What happens.
    Plain,
    /// What somebody has to know.
    Warning,
    /// What has failed.
    Error,
}

/// The text in its colour, if the stream has colours.
pub(super) fn paint(text: &str, tone: Tone, stream: Stream) -> String {
    let code = match tone {
        _ if !stream.is_coloured() => return text.to_owned(),
        Tone::Plain => 1,
        Tone::Warning => 33,
        Tone::Error => 31,
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}

/// The columns of the terminal to which results go; none where they go elsewhere.
pub(super) fn columns() -> Option<usize> {
    let size = terminal_size::terminal_size_of(stdout())?;
    Some(size.0.0.into())
}

/// A text in lines of at most so many characters, unless a word is longer.
pub(super) fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let last = lines.len() - 1;
        let line = &mut lines[last];
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= columns {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_break_between_words() {
        assert_eq!(wrap("one two  three", 7), ["one two", "three"]);
        assert_eq!(wrap("extraordinary", 7), ["extraordinary"]);
        assert_eq!(wrap("", 7), [""]);
    }

    #[test]
    fn what_goes_to_no_terminal_has_no_colour() {
        assert_eq!(paint("a", Tone::Error, Stream::Out), "a");
    }
}
