//! Programs that the agent runs in its guest, and the guest's clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::{Agent, AgentError};

/// How long the agent may take to answer a question that it need not work for.
const ANSWER: Duration = Duration::from_secs(30);

/// How long the agent may take to set the clock, for which it runs hwclock(8).
const SET_TIME: Duration = Duration::from_secs(60);

/// The time between two questions whether a program has ended: the first, and the longest.
const NAP: Duration = Duration::from_millis(20);
const LONGEST_NAP: Duration = Duration::from_secs(1);

/// The most bytes of a program's standard error that are told: its end.
const MAX_SAID: usize = 1000;

impl Agent {
    /// Runs a command by the guest's shell, and waits until it has ended, however long that takes.
    ///
    /// # Errors
    /// [`AgentError::Program`] when it does not end well.
    pub async fn run(&mut self, command: &str) -> Result<(), AgentError> {
        let arguments =
            json!({ "path": "/bin/sh", "arg": ["-c", command], "capture-output": true });
        let started = self.ask("guest-exec", arguments, ANSWER).await?;
        let mut nap = NAP;
        let status = loop {
            tokio::time::sleep(nap).await;
            nap = (nap * 2).min(LONGEST_NAP);
            let pid = json!({ "pid": started["pid"] });
            let status = self.ask("guest-exec-status", pid, ANSWER).await?;
            if status["exited"] == true {
                break status;
            }
        };
        match ending(&status) {
            None => Ok(()),
            Some(ended) => {
                Err(AgentError::Program { command: command.to_owned(), ended, said: said(&status) })
            }
        }
    }

    /// Gives the guest's network interface of address `old` the address `new`, by ip(8).
    ///
    /// # Errors
    /// [`AgentError::NoInterface`] when none has that address.
    pub async fn change_address(&mut self, old: &str, new: &str) -> Result<(), AgentError> {
        let interfaces = self.ask("guest-network-get-interfaces", Value::Null, ANSWER).await?;
        let has_it = |interface: &&Value| {
            let address = interface["hardware-address"].as_str();
            address.is_some_and(|address| address.eq_ignore_ascii_case(old))
        };
        let interface = interfaces.as_array().into_iter().flatten().find(has_it);
        let name = interface.and_then(|interface| interface["name"].as_str());
        // What a guest calls its interfaces goes into a command for its own shell.
        let name = name.and_then(|name| shlex::try_quote(name).ok());
        let Some(name) = name else {
            return Err(AgentError::NoInterface { address: old.to_owned() });
        };
        // Most drivers take a new address while the interface is up; others only while it is down.
        let set = format!("ip link set dev {name} address {new}");
        let switch = |way| format!("ip link set dev {name} {way}");
        let (down, up) = (switch("down"), switch("up"));
        self.run(&format!("{set} || {{ {down} && {set} && {up}; }}")).await
    }

    /// Sets the guest's clock to the host's time.
    pub async fn set_time(&mut self) -> Result<(), AgentError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // Nanoseconds since 1970 fit until 2262.
        let now = json!({ "time": now.as_nanos() as i64 });
        self.ask("guest-set-time", now, SET_TIME).await.map(drop)
    }
}

/// How a program has ended, in words; none where it ended well.
fn ending(status: &Value) -> Option<String> {
    match (status["exitcode"].as_i64(), status["signal"].as_i64()) {
        (Some(0), None) => None,
        (Some(code), None) => Some(format!("exit status {code}")),
        (_, Some(signal)) => Some(format!("signal {signal}")),
        (None, None) => Some("an unknown status".to_owned()),
    }
}

/// The end of what a program has written to its standard error, with a separator ahead; empty
/// where that is nothing.
fn said(status: &Value) -> String {
    let bytes = decoded(status["err-data"].as_str().unwrap_or_default());
    let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(MAX_SAID)..]);
    match text.trim() {
        "" => String::new(),
        text => format!(": {text}"),
    }
}

/// The bytes of a text in base64 (RFC 4648), up to the first sign that is none of it.
fn decoded(text: &str) -> Vec<u8> {
    let value = |sign: u8| match sign {
        b'A'..=b'Z' => Some(sign - b'A'),
        b'a'..=b'z' => Some(sign - b'a' + 26),
        b'0'..=b'9' => Some(sign - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let (mut bytes, mut bits, mut len) = (Vec::new(), 0u32, 0);
    for six in text.bytes().map_while(value) {
        (bits, len) = (bits << 6 | u32::from(six), len + 6);
        if len >= 8 {
            len -= 8;
            // What is ahead of these eight bits has been taken.
            bytes.push((bits >> len) as u8);
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_decoded() {
        for (text, bytes) in
            [("", &b""[..]), ("bm8=", b"no"), ("bm8K", b"no\n"), ("+/8=", b"\xfb\xff")]
        {
            assert_eq!(decoded(text), bytes, "{text}");
        }
    }

    #[test]
    fn how_a_program_ended_is_told() {
        assert_eq!(ending(&json!({ "exited": true, "exitcode": 0 })), None);
        let failed = json!({ "exited": true, "exitcode": 3, "err-data": "bm8K" });
        assert_eq!(
            (ending(&failed).as_deref(), said(&failed).as_str()),
            (Some("exit status 3"), ": no")
        );
        let killed = json!({ "exited": true, "signal": 9 });
        assert_eq!((ending(&killed).as_deref(), said(&killed).as_str()), (Some("signal 9"), ""));
    }
}
