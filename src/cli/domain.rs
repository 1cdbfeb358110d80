//! The arguments of a revert under libvirt.

use clap::Args;

use crate::libvirt::DomainOptions;

/// Which domain is started, by which libvirt.
#[derive(Args, Clone)]
pub(super) struct DomainArgs {
    /// Have libvirt start the guest, as the domain of this name or UUID with which it was saved
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with_all = ["qemu", "qmp", "ports", "netdevs", "truncate_logs", "ephemeral", "extra", "count", "name", "dir", "vmgenid", "mac", "agent_exec", "agent_set_time"]
    )]
    domain: Option<String>,
    /// The libvirt to connect to, such as qemu:///system [default: as virsh]
    #[arg(long, value_name = "URI", requires = "domain")]
    connect: Option<String>,
    /// End the domain first, if it runs
    #[arg(long, requires = "domain", conflicts_with = "new")]
    replace: bool,
    /// Start a sibling of the domain, of this name: its UUID, the addresses of its network cards,
    /// its sockets, log files and ports are its own
    #[arg(long, value_name = "NAME", requires = "domain")]
    new: Option<String>,
    /// Make the saved definition the domain's persistent one, once it runs
    #[arg(long, requires = "domain")]
    define: bool,
}

impl DomainArgs {
    /// The options that they stand for; none without `--domain`.
    pub(super) fn options(self) -> Option<DomainOptions> {
        let DomainArgs { domain, connect, replace, new, define } = self;
        let domain = domain?;
        let mut options = DomainOptions::new();
        (options.domain, options.uri, options.sibling) = (Some(domain), connect, new);
        (options.replace, options.define) = (replace, define);
        Some(options)
    }
}
