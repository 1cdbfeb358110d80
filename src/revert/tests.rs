//! The end of a revert, at which QEMU can't be held up: against a scripted socket.

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::*;

/// A QEMU's control socket: `answer` gives what is sent for each command.
async fn scripted(mut answer: impl FnMut(&str) -> Vec<Value> + Send + 'static) -> Qmp {
    let (ours, theirs) = UnixStream::pair().unwrap();
    tokio::spawn(async move {
        let (commands, mut answers) = theirs.into_split();
        let version = json!({"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""});
        let mut said = vec![json!({"QMP": {"version": version, "capabilities": []}})];
        let mut commands = BufReader::new(commands).lines();
        loop {
            for message in said.drain(..) {
                answers.write_all(format!("{message}\r\n").as_bytes()).await.unwrap();
            }
            let Ok(Some(line)) = commands.next_line().await else { return };
            let command: Value = serde_json::from_str(&line).unwrap();
            said = match command["execute"].as_str().unwrap() {
                "qmp_capabilities" => vec![json!({"return": {}})],
                name => answer(name),
            };
            // Events go without an id; an answer may be any of the messages.
            for message in said.iter_mut().filter(|message| message.get("event").is_none()) {
                message["id"] = command["id"].clone();
            }
        }
    });
    Qmp::over(ours, Duration::from_secs(60)).await.unwrap()
}

fn migration(status: &str) -> Value {
    json!({"event": "MIGRATION", "data": {"status": status},
           "timestamp": {"seconds": 1, "microseconds": 1}})
}

#[tokio::test]
async fn the_end_is_waited_for_by_its_event() {
    let qmp = scripted(|command| match command {
        "query-migrate" => vec![
            json!({"return": {"status": "postcopy-active"}}),
            migration("device"),
            migration("completed"),
        ],
        _ => vec![json!({"return": {}})],
    });
    finish(&qmp.await).await.unwrap();
}

#[tokio::test]
async fn a_save_that_has_begun_meanwhile_is_not_waited_for() {
    let qmp = scripted(|command| match command {
        "query-migrate" => vec![json!({"return": {"status": "active"}})],
        _ => vec![json!({"error": {"class": "GenericError", "desc": "there is a migration"}})],
    });
    let error = finish(&qmp.await).await.unwrap_err();
    assert!(matches!(&error, QmpError::Command { .. }), "{error}");
}

#[tokio::test]
async fn whether_the_guest_has_run_is_known_when_qemu_is_gone() {
    let resume = json!({"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 1}});
    for (said, has) in [(migration("active"), false), (resume, true)] {
        let qmp = scripted(move |_| vec![said.clone(), json!({"return": {}})]).await;
        let mut events = qmp.events();
        qmp.execute("quit", ()).await.unwrap();
        // It closes the connection.
        drop(qmp);
        assert_eq!(has_run(&mut events).await, has);
    }
}
