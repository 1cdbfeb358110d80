//! What is logged, beside what commands print.

use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Diagnostics go to stderr: warnings, and what the variable SNAPBACK_LOG asks for.
pub(super) fn init() {
    let words = std::env::var_os("SNAPBACK_LOG").unwrap_or_default();
    let asked = logged(&words.to_string_lossy());
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    let filter = asked.clone().unwrap_or_else(warnings);
    tracing_subscriber::registry().with(log.with_filter(filter)).init();
    if asked.is_none() {
        tracing::warn!(
            "SNAPBACK_LOG={words:?} is not understood, and warnings are logged: it is a level (off, error, \
             warn, info, debug), or levels of targets, such as info,snapback::save=debug"
        );
    }
}

fn warnings() -> Targets {
    Targets::new().with_default(LevelFilter::WARN)
}

/// What is logged for the words of SNAPBACK_LOG: warnings, where they say nothing else. None, if one of them
/// is not understood.
fn logged(words: &str) -> Option<Targets> {
    // Not an `EnvFilter`: for words that nobody gives it brings automata of regular expressions. Nor what
    // `Targets` reads: a word alone that is no level is a target to it, and a slip silences all others.
    let level = |word: &str| word.parse::<LevelFilter>().ok().filter(|_| !word.is_empty());
    let mut words = words.split(',').map(str::trim).filter(|word| !word.is_empty());
    words.try_fold(warnings(), |asked, word| match word.split_once('=') {
        Some((target, word)) => Some(asked.with_target(target, level(word)?)),
        None => Some(asked.with_default(level(word)?)),
    })
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn the_log_is_what_is_asked_for() {
        let most = |words| {
            let asked = logged(words).expect(words);
            let levels = [Level::TRACE, Level::DEBUG, Level::INFO, Level::WARN, Level::ERROR];
            levels.into_iter().find(|level| asked.would_enable("snapback::save", level))
        };
        assert_eq!(most(""), Some(Level::WARN));
        assert_eq!(most("debug"), Some(Level::DEBUG));
        assert_eq!(most("off"), None);
        assert_eq!(most("error,snapback::save=trace"), Some(Level::TRACE));
        assert_eq!(most("info,snapback=off"), None);
        // What it doesn't say of others stays.
        assert_eq!(most("snapback::revert=debug"), Some(Level::WARN));
        for unknown in
            ["loud", "info,loud", "snapback::save", "snapback=loud", "snapback=", "a=b=c"]
        {
            assert!(logged(unknown).is_none(), "{unknown}");
        }
    }
}
