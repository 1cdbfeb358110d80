//! The arguments of a revert about what tells its guest from others of the same image.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::clones::expanded;
use super::failure::Failure;
use super::hook::{Hook, RunningHook};
use crate::guest::RewriteOptions;
use crate::kind::ErrorKind;
use crate::revert::{AgentOptions, CloneIdentity, RevertEvent, environment};

/// What is done for a guest of its own.
#[derive(Args, Clone)]
pub(super) struct IdentityArgs {
    /// Run COMMAND (by sh -c) as soon as the guest runs; see SNAPBACK_CLONE, SNAPBACK_DIR,
    /// SNAPBACK_PID, SNAPBACK_QMP and SNAPBACK_PORTS in its environment
    #[arg(long, value_name = "COMMAND")]
    hook_running: Option<String>,
    /// Give the guest a new generation ID, by which it knows that it is one of several now. It must
    /// have been saved with the device vmgenid
    #[arg(long, value_name = "WHICH")]
    vmgenid: Option<Renewed>,
    /// Give each network card a new address, by the guest's agent and ip(8) in the guest. Until then
    /// the guest finds the card's cable unplugged
    #[arg(long, value_name = "WHICH")]
    mac: Option<Renewed>,
    /// Have the guest's agent (qemu-guest-agent) run COMMAND by the guest's /bin/sh as soon as the
    /// guest runs, and wait for its end. In it {n} stands for the clone's number, {name} for its
    /// name and {dir} for its directory
    #[arg(long, value_name = "COMMAND")]
    agent_exec: Vec<String>,
    /// Have the guest's agent set the guest's clock to this host's time as soon as the guest runs
    #[arg(long)]
    agent_set_time: bool,
    /// The socket of the guest's agent [default: that of the port org.qemu.guest_agent.0 on the
    /// command line]; {n}, {name} and {dir} as above
    #[arg(long, value_name = "PATH")]
    agent: Option<PathBuf>,
}

/// What takes the place of something that all guests of an image share.
#[derive(Clone, Copy, ValueEnum)]
pub(super) enum Renewed {
    /// A random one
    New,
}

impl IdentityArgs {
    /// Adds them to a revert's options.
    pub fn apply(&self, options: RewriteOptions) -> RewriteOptions {
        RewriteOptions { new_generation: self.vmgenid.is_some(), ..options }
    }

    /// The arguments of one clone. The hook is told by its environment: `${name}` is the shell's.
    pub fn of_clone(self, clone: &CloneIdentity) -> IdentityArgs {
        IdentityArgs {
            agent_exec: self.agent_exec.iter().map(|command| clone.expand(command)).collect(),
            agent: self.agent.map(|path| expanded(&path, clone)),
            ..self
        }
    }

    /// What the guest's agent is told.
    pub fn agent(&self) -> AgentOptions {
        AgentOptions {
            socket: self.agent.clone(),
            new_macs: self.mac.is_some(),
            set_time: self.agent_set_time,
            commands: self.agent_exec.clone(),
        }
    }

    /// The command to be run once the guest runs.
    pub fn hook(&self) -> Option<Hook> {
        let command = self.hook_running.clone()?;
        Some(Hook::new("--hook-running", command, "the guest runs on"))
    }

    /// What is waited for behind the event `running`.
    pub fn awaited(&self) -> Awaited {
        Awaited { hook: self.hook_running.is_some(), agent: !self.agent().is_empty() }
    }
}

/// Starts the command of `--hook-running` when it is told that the guest runs.
pub(super) fn start_when_running(
    hook: &mut Option<Hook>,
    event: &RevertEvent,
    clone: Option<&CloneIdentity>,
) -> Option<RunningHook> {
    let RevertEvent::Running { pid, ports, qmp } = event else { return None };
    let clone = clone.map(|clone| (clone.name.as_str(), clone.directory.as_path()));
    Some(hook.take()?.start(environment(clone, *pid, qmp.as_deref(), ports)))
}

/// What is still waited for of what follows on the event `running`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Awaited {
    /// The end of the hook.
    pub hook: bool,
    /// The last that the agent is told.
    pub agent: bool,
}

impl Awaited {
    /// Takes note of an event. Returns what has failed, if that is what it tells.
    pub fn hear(&mut self, event: &RevertEvent) -> Option<Failure> {
        let RevertEvent::Agent { failed, left, .. } = event else { return None };
        self.agent &= *left > 0 && failed.is_none();
        failed.as_ref().map(|why| {
            let message = format!("the guest's agent did not do all: {why}; the guest runs on");
            Failure::said(ErrorKind::AgentFailed, message)
        })
    }

    /// Whether all has come.
    pub fn is_over(self) -> bool {
        !self.hook && !self.agent
    }
}
