//! A command line from a shell script, from libvirt's log, or copied from /proc.

/// The words of a command line. Words are split as a POSIX shell splits them, with
/// quotes, backslashes and comments, but nothing is expanded; a text with zero bytes
/// in it is taken as /proc/PID/cmdline (proc_pid_cmdline(5)) and split at these.
///
/// # Errors
/// When the text can't be parsed; says why.
pub fn words(text: &str) -> Result<Vec<String>, String> {
    if text.contains('\0') {
        let text = text.strip_suffix('\0').unwrap_or(text);
        return Ok(text.split('\0').map(str::to_owned).collect());
    }
    let words = shlex::split(&without_continuations(text))
        .ok_or("a quote has no end, or a backslash ends the text")?;
    let expands = |word: &&String| word.contains("$(") || word.contains("${") || word.contains('`');
    match words.iter().find(expands) {
        Some(word) => Err(format!("{word:?} is for a shell to expand: write what it stands for")),
        None => Ok(words),
    }
}

/// The text without the line ends that a backslash takes away: one between two words, which blanks follow,
/// would be an empty word to `shlex`.
fn without_continuations(text: &str) -> String {
    let mut joined = String::with_capacity(text.len());
    let (mut quote, mut comment) = (None, false);
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        let starts_word = joined.chars().next_back().is_none_or(char::is_whitespace);
        match (character, quote) {
            ('\n', _) if comment => comment = false,
            _ if comment => {}
            ('#', None) if starts_word => comment = true,
            ('\\', None | Some('"')) => match characters.next() {
                Some('\n') => continue,
                escaped => {
                    joined.push(character);
                    joined.extend(escaped);
                    continue;
                }
            },
            ('\'' | '"', None) => quote = Some(character),
            (_, Some(open)) if open == character => quote = None,
            _ => {}
        }
        joined.push(character);
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shell_words_and_proc_words() {
        let script = "LC_ALL=C \\\n/usr/bin/qemu-system-x86_64 \\\n-name 'guest=a b' # mine\n -S";
        let expected = ["LC_ALL=C", "/usr/bin/qemu-system-x86_64", "-name", "guest=a b", "-S"];
        assert_eq!(words(script).unwrap(), expected);
        let indented = "qemu \\\n  -name \\\n\ta'\\\n' \"b\\\nc\" d\\\ne \\\\ # it's \\\n -S \\\n";
        let expected = ["qemu", "-name", "a\\\n", "bc", "de", "\\", "-S"];
        assert_eq!(words(indented).unwrap(), expected);
        assert_eq!(words("qemu\0-name\0a b\0").unwrap(), ["qemu", "-name", "a b"]);
        assert!(words("qemu -name 'a").unwrap_err().contains("quote"));
        assert!(words("qemu -m ${MEM}").unwrap_err().contains("${MEM}"));
    }
}
