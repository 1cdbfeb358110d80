//! QEMU's command line of a libvirt domain, translated by libvirt itself.

use std::process::Command;
use std::time::Duration;

use super::words;
use crate::cancel::Cancellation;
use crate::host::program::answer;

/// The most bytes of virsh's message that are passed on.
const MAX_SAID: usize = 500;

/// How long `virsh` may take. It may ask a libvirt on another host.
const LIMIT: Duration = Duration::from_secs(120);

/// Translates a domain's XML by `virsh`. It asks the libvirt that its user uses by
/// default (`LIBVIRT_DEFAULT_URI`, virsh(1)).
///
/// # Errors
/// Says why there is no command line.
pub(super) fn command_line(xml: &str, cancel: &Cancellation) -> Result<Vec<String>, String> {
    let mut command = Command::new("virsh");
    command.args(["--quiet", "domxml-to-native", "qemu-argv", "--xml", "/dev/stdin"]);
    let answer = answer(command, xml.as_bytes().to_vec(), LIMIT, cancel)
        .map_err(|error| format!("`virsh` {error}"))?;
    if !answer.status.success() {
        let said = String::from_utf8_lossy(&answer.stderr);
        let said: String = said.trim().replace('\n', "; ").chars().take(MAX_SAID).collect();
        return Err(format!("`virsh domxml-to-native` failed: {said}"));
    }
    let line = String::from_utf8(answer.stdout).map_err(|_| "virsh's answer is not UTF-8")?;
    words(&line)
}
