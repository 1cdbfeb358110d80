//! What the kernel command line asks for, as `oracle.NAME=VALUE`.

use std::fmt;

/// Memory to fill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// That many MiB.
    Mib(u64),
    /// That share of what the kernel leaves available.
    Percent(u64),
}

/// What the writers do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Writer threads.
    pub writers: u64,
    /// Pages which each writer rewrites a second; 0 for as many as it can.
    pub rate: u64,
    /// Only the first so many pages are rewritten; 0 for all.
    pub hot_pages: u64,
}

/// Everything that can be asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub fill: Fill,
    pub load: Load,
    pub random_percent: u64,
    pub zero_percent: u64,
    /// Milliseconds between two heartbeats; 0 for none.
    pub beat_ms: u64,
    /// Kernel modules to load, in this order.
    pub modules: Vec<String>,
    /// A disk with a system to run in the oracle's place.
    pub root: Option<String>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            fill: Fill::Percent(75),
            load: Load { writers: 1, rate: 1000, hot_pages: 0 },
            random_percent: 50,
            zero_percent: 15,
            beat_ms: 20,
            modules: Vec::new(),
            root: None,
        }
    }
}

/// An option that can't be used.
#[derive(Debug, PartialEq, Eq)]
pub struct BadOption(String);

impl fmt::Display for BadOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernel command line: {} is not an option of the oracle or out of range", self.0)
    }
}

impl std::error::Error for BadOption {}

impl Config {
    /// Reads the options; words that don't begin with `oracle.` are the kernel's.
    pub fn parse(cmdline: &str) -> Result<Config, BadOption> {
        let mut config = Config::default();
        for word in cmdline.split_whitespace() {
            let Some(option) = word.strip_prefix("oracle.") else { continue };
            config.set(option).ok_or_else(|| BadOption(word.to_string()))?;
        }
        if config.random_percent + config.zero_percent > 100 {
            return Err(BadOption("oracle.random_percent + oracle.zero_percent > 100".into()));
        }
        Ok(config)
    }

    fn set(&mut self, option: &str) -> Option<()> {
        let (name, value) = option.split_once('=')?;
        if name == "modules" {
            self.modules = value.split(',').filter(|m| !m.is_empty()).map(String::from).collect();
            return Some(());
        }
        if name == "root" {
            self.root = Some(value.into());
            return Some(());
        }
        let number: u64 = value.parse().ok()?;
        let percent = (number <= 100).then_some(number);
        match name {
            "fill_mib" => self.fill = Fill::Mib(number),
            "fill_percent" => self.fill = Fill::Percent(percent?),
            "writers" => self.load.writers = number,
            "rate" => self.load.rate = number,
            "hot_pages" => self.load.hot_pages = number,
            "random_percent" => self.random_percent = percent?,
            "zero_percent" => self.zero_percent = percent?,
            "beat_ms" => self.beat_ms = number,
            _ => return None,
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_picked_out_of_the_kernels() {
        let config = Config::parse(
            "console=ttyS0 quiet oracle.fill_mib=64 oracle.rate=0 oracle.modules=virtio,virtio_ring \
             oracle.root=/dev/vda\n",
        );
        let expected = Config {
            fill: Fill::Mib(64),
            load: Load { rate: 0, ..Config::default().load },
            modules: vec!["virtio".into(), "virtio_ring".into()],
            root: Some("/dev/vda".into()),
            ..Config::default()
        };
        assert_eq!(config, Ok(expected));
    }

    #[test]
    fn a_mistyped_option_is_refused_by_name() {
        for word in
            ["oracle.fil_mib=1", "oracle.rate", "oracle.rate=fast", "oracle.fill_percent=101"]
        {
            assert_eq!(Config::parse(word), Err(BadOption(word.into())));
        }
    }

    #[test]
    fn shares_can_not_exceed_the_whole() {
        assert!(Config::parse("oracle.random_percent=60 oracle.zero_percent=50").is_err());
    }
}
