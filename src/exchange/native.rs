//! QEMU's command line of a domain that libvirt describes: libvirt itself makes it.

use std::io::Write;
use std::process::{Command, Stdio};

use super::words;

/// The most bytes of a complaint that are passed on.
const MAX_SAID: usize = 500;

/// Has `virsh` translate a domain's XML. It asks the libvirt that its user uses by
/// default (`LIBVIRT_DEFAULT_URI`, virsh(1)).
///
/// # Errors
/// Says why there is no command line.
pub(super) fn command_line(xml: &str) -> Result<Vec<String>, String> {
    let mut command = Command::new("virsh");
    command.args(["--quiet", "domxml-to-native", "qemu-argv", "--xml", "/dev/stdin"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|e| format!("`virsh` can't be run: {e}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // It says itself why it did not read on.
        let _ = stdin.write_all(xml.as_bytes());
    }
    let output = child.wait_with_output().map_err(|e| format!("`virsh` failed: {e}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said: String = said.trim().replace('\n', "; ").chars().take(MAX_SAID).collect();
        return Err(format!("`virsh domxml-to-native` failed: {said}"));
    }
    let line = String::from_utf8(output.stdout).map_err(|_| "virsh's answer is not UTF-8")?;
    words(&line)
}
