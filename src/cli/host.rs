//! The arguments of a revert about what of this host its QEMU takes.

use clap::Args;

use super::failure::Failure;
use super::parse_path_pair;
use crate::guest::{NewPort, Profile, RewriteOptions};
use crate::kind::ErrorKind;
use crate::revert::CloneIdentity;

/// Ports, networks and log files of a reverted guest.
#[derive(Args, Clone)]
pub(super) struct HostArgs {
    /// Bind the port NEW of this host wherever the recorded command line binds OLD; with NEW
    /// auto, a free one, which the event `running` names
    #[arg(long = "port", value_name = "OLD=NEW", value_parser = parse_port_template)]
    ports: Vec<String>,
    /// Use the network backend SPEC, as -netdev takes it, in place of the recorded one with this
    /// id
    #[arg(long = "netdev", value_name = "ID=SPEC", value_parser = parse_netdev)]
    netdevs: Vec<(String, String)>,
    /// Have QEMU truncate the log files of serial ports, which are appended to otherwise
    #[arg(long)]
    truncate_logs: bool,
}

impl HostArgs {
    /// The arguments of one clone.
    pub(super) fn of_clone(self, clone: &CloneIdentity) -> HostArgs {
        let expand = |text: String| clone.expand(&text);
        let pair = |(id, spec): (String, String)| (expand(id), expand(spec));
        HostArgs {
            ports: self.ports.into_iter().map(expand).collect(),
            netdevs: self.netdevs.into_iter().map(pair).collect(),
            ..self
        }
    }

    /// Adds them to a revert's options.
    pub(super) fn apply(self, options: RewriteOptions) -> Result<RewriteOptions, Failure> {
        let HostArgs { ports, netdevs, truncate_logs } = self;
        let pair = |text: String| {
            let wrong =
                |why| Failure::said(ErrorKind::OptionsInvalid, format!("--port {text}: {why}"));
            parse_port_pair(&text).map_err(wrong)
        };
        let ports = ports.into_iter().map(pair).collect::<Result<_, _>>()?;
        Ok(RewriteOptions { ports, netdevs, truncate_logs, ..options })
    }
}

/// Checks a pair as it will be for the first clone.
fn parse_port_template(text: &str) -> Result<String, String> {
    parse_port_pair(&CloneIdentity::new(1, "1", "1").expand(text)).map(|_| text.to_owned())
}

pub(super) fn parse_port_pair(text: &str) -> Result<(u16, NewPort), String> {
    let rule = NewPort::read_rule(text);
    rule.ok_or("it has the form OLD=NEW: a port, and another one or auto".into())
}

pub(super) fn parse_netdev(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((id, spec)) if !id.is_empty() && !spec.is_empty() => Ok((id.into(), spec.into())),
        _ => Err("it has the form ID=SPEC".into()),
    }
}

/// What a guest's command line has otherwise at another site.
#[derive(Args, Clone)]
pub(super) struct SiteArgs {
    /// Use the path NEW wherever the recorded command line names OLD or a path below it
    #[arg(long = "path", value_name = "OLD=NEW", value_parser = parse_path_pair)]
    paths: Vec<(String, String)>,
    /// Bind the port NEW of the host (auto: a free one) wherever the recorded command line binds OLD
    #[arg(long = "port", value_name = "OLD=NEW", value_parser = parse_port_template)]
    ports: Vec<String>,
    /// Use the network backend SPEC, as -netdev takes it, in place of the recorded one with this
    /// id
    #[arg(long = "netdev", value_name = "ID=SPEC", value_parser = parse_netdev)]
    netdevs: Vec<(String, String)>,
}

impl SiteArgs {
    /// As it is kept with a snapshot.
    pub(super) fn profile(self) -> Profile {
        let pairs = |pairs: Vec<(String, String)>| {
            pairs.into_iter().map(|(left, right)| format!("{left}={right}")).collect()
        };
        let all =
            [("path", pairs(self.paths)), ("port", self.ports), ("netdev", pairs(self.netdevs))];
        let given = all.into_iter().filter(|(_, values): &(_, Vec<String>)| !values.is_empty());
        given.map(|(name, values)| (name.to_owned(), values)).collect()
    }

    /// Adds them to a revert's options.
    pub(super) fn apply(self, mut options: RewriteOptions) -> Result<RewriteOptions, Failure> {
        let added = options.add_profile(&self.profile());
        added.map_err(|error| Failure::said(error.kind(), error.to_string()))?;
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_and_networks_are_read_as_documented() {
        assert_eq!(parse_port_pair("2222=2223"), Ok((2222, NewPort::Number(2223))));
        assert_eq!(parse_port_pair("5901=auto"), Ok((5901, NewPort::Free)));
        for wrong in ["", "2222", "2222=", "=1", "0=1", "a=1", "1=70000", "1=x"] {
            assert!(parse_port_pair(wrong).is_err(), "{wrong}");
        }
        let netdev = ("n".to_owned(), "user,hostfwd=tcp::1-:2".to_owned());
        assert_eq!(parse_netdev("n=user,hostfwd=tcp::1-:2"), Ok(netdev));
        for wrong in ["", "n", "n=", "=user"] {
            assert!(parse_netdev(wrong).is_err(), "{wrong}");
        }
    }
}
