//! A daemon's pools: guests that wait, are taken, reset and released, whoever dies.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::harness::{Dir, Reverted, Running, Snapback, send_signal, text, wait_gone};
use crate::shared::{MIB, shared};
use crate::support::{Qemu, Result, SOON, SerialLog, http_request, process_gone, wait_for};
use crate::{tests, tests_on_both};

tests_on_both! {
    guests_are_taken_reset_and_released
    a_killed_daemon_leaves_its_guests
}

tests! {
    requests_beyond_the_most_wait_in_order
    a_pool_without_its_image_is_degraded_until_it_comes
    a_guest_that_ends_by_itself_is_replaced
    no_more_guests_than_memory_allows
    memory_is_shared_by_a_flat_copy
    everything_that_waits_is_in_place_where_that_was_asked_for
    a_daemon_keeps_its_pools
    one_daemon_at_a_time
    answers_are_as_the_document_says
    who_comes_by_tcp_needs_the_token
    what_happens_is_told_as_it_does
    the_python_client_and_its_examples_work
}

/// A daemon. Dropping it kills it.
pub struct Daemon {
    server: Running,
    pub socket: PathBuf,
}

impl Daemon {
    pub fn start(dir: &Dir) -> Result<Daemon> {
        Daemon::with(dir, &[])
    }

    pub fn with(dir: &Dir, more: &[&str]) -> Result<Daemon> {
        let socket = dir.path("daemon.sock");
        let (state, listen) = (dir.path("state"), format!("unix:{}", text(&socket)));
        let args = ["daemon", "--state", text(&state), "--listen", &listen];
        let mut server = dir.snapback(&args).with(more).start()?;
        server.wait("listening")?;
        Ok(Daemon { server, socket })
    }

    /// A command that asks it.
    pub fn ask(&self, dir: &Dir, args: &[&str]) -> Snapback {
        dir.snapback(args).env("SNAPBACK_SOCKET", text(&self.socket))
    }

    /// Creates a pool of the shared image's guests, and waits until so many of them wait.
    pub fn pool(&self, dir: &Dir, qemu: Qemu, armed: u64, more: &[&str]) -> Result<()> {
        let armed_text = armed.to_string();
        let args = ["pool", "create", "booted", text(&shared(qemu)?.image), "--armed", &armed_text];
        self.ask(dir, &args).with(more).succeed()?;
        self.wait_ready(armed)
    }

    pub fn wait_ready(&self, armed: u64) -> Result<()> {
        let pool = || self.get("/v1/pools/booted");
        let ready =
            wait_for(SOON, "armed guests", || Ok((pool()?["ready"] == armed).then_some(())));
        ready.map_err(|error| format!("{error}: {:?}", pool()).into())
    }

    /// Takes a guest.
    pub fn take(&self, dir: &Dir) -> Result<Taken> {
        let ended = self.ask(dir, &["take", "booted"]).succeed()?;
        Taken::of(ended.event("running")?)
    }

    /// What it answers to `GET path`.
    pub fn get(&self, path: &str) -> Result<Value> {
        let (status, body) = self.request("GET", path, "")?;
        assert_eq!(status, 200, "{path}: {body}");
        Ok(serde_json::from_str(&body)?)
    }

    /// What it answers: the status and the body.
    pub fn request(&self, method: &str, path: &str, body: &str) -> Result<(u16, String)> {
        let stream = UnixStream::connect(&self.socket)?;
        http_request(stream, method, path, "", body)
    }

    /// Ends it as an administrator does. Guests that were taken go on.
    pub fn end(self) -> Result<()> {
        self.server.signal(libc::SIGTERM);
        // It may have warned of what it met.
        let ended = self.server.end()?;
        assert_eq!(ended.code, Some(0), "{ended:?}");
        Ok(())
    }

    /// Kills it, and waits until it is gone.
    pub fn kill(self) -> Result<()> {
        let pid = self.server.pid();
        self.server.signal(libc::SIGKILL);
        drop(self);
        wait_gone(pid)
    }
}

/// A guest that was taken.
pub struct Taken {
    pub id: String,
    folder: PathBuf,
    pub guest: Reverted,
}

impl Taken {
    /// The one that was told, by an event or as the daemon lists it.
    pub fn of(event: &Value) -> Result<Taken> {
        let folder = PathBuf::from(event["dir"].as_str().ok_or("no directory")?);
        let pid = event["qemu_pid"].as_u64().ok_or("no process")? as u32;
        let id = event["id"].as_str().ok_or("no id")?.to_owned();
        Ok(Taken { id, guest: Reverted::alone(pid, &folder)?, folder })
    }

    /// The same guest in a QEMU of another number.
    pub fn now_in(self, pid: &Value) -> Result<Taken> {
        let pid = pid.as_u64().ok_or("no process")? as u32;
        if pid == self.pid() {
            return Ok(self);
        }
        Ok(Taken { guest: Reverted::alone(pid, &self.folder)?, ..self })
    }

    pub fn check(&mut self, qemu: Qemu) -> Result<()> {
        self.guest.check(&shared(qemu)?.nonce)
    }

    /// The same of one that may have gone back to its image since.
    pub fn check_anew(&mut self, qemu: Qemu) -> Result<()> {
        self.guest.log = SerialLog::from_now(&self.folder.join("serial0.log"));
        self.check(qemu)
    }

    pub fn pid(&self) -> u32 {
        self.guest.pid
    }
}

fn guests_are_taken_reset_and_released(dir: &Dir, qemu: Qemu) -> Result<()> {
    let daemon = Daemon::start(dir)?;
    daemon.pool(dir, qemu, 2, &[])?;
    let mut first = daemon.take(dir)?;
    let mut second = daemon.take(dir)?;
    assert!(first.id != second.id && first.folder != second.folder);
    first.check(qemu)?;
    second.check(qemu)?;

    // Once all its memory is there, a guest goes back inside its QEMU.
    let path = format!("/v1/guests/{}", first.id);
    let resettable = || -> Result<()> {
        wait_for(SOON, "its writes to be tracked", || {
            Ok((daemon.get(&path)?["resettable"] == true).then_some(()))
        })
    };
    resettable()?;
    let ended = dir.snapback(&["reset", &first.id]).succeed()?;
    assert_eq!(ended.event("reset")?["how"], "in_place", "{ended:?}");
    first.guest.log = SerialLog::from_now(&first.folder.join("serial0.log"));
    first.check(qemu)?;

    // Both are listed, with their pool's daemon as their server.
    let listed = dir.snapback(&["ps"]).succeed()?;
    for taken in [&first, &second] {
        let run = listed.events.iter().find(|run| run["id"] == taken.id.as_str());
        assert_eq!(run.ok_or("not listed")?["qemu_pid"], taken.pid());
    }
    // And what the daemon keeps of their image.
    let cache = listed.event("cache")?;
    assert_eq!((&cache["pools"], &cache["limit"]), (&json!(["booted"]), &json!(256 << 20)));
    assert!(cache["bytes"].as_u64() > Some(0), "{cache}");
    daemon.ask(dir, &["release", &first.id]).succeed()?;
    assert!(process_gone(first.pid()) && !first.folder.exists());
    assert_eq!(daemon.get("/v1/pools/booted")?["running"], 1);
    dir.snapback(&["stop", &second.id]).succeed()?;
    assert!(process_gone(second.pid()) && !second.folder.exists());
    let (status, body) = daemon.request("GET", &path, "")?;
    assert!(status == 404 && body.contains("no_such_guest"), "{body}");
    daemon.end()?;
    assert_eq!(dir.recorded()?, [""; 0]);
    Ok(())
}

fn a_killed_daemon_leaves_its_guests(dir: &Dir, qemu: Qemu) -> Result<()> {
    let daemon = Daemon::start(dir)?;
    let slowly = ["--preload", "none", "--fill-delay", "1000000"];
    daemon.pool(dir, qemu, 2, &slowly)?;
    // One whose memory is incomplete goes on by its keeper.
    let mut taken = daemon.take(dir)?;
    taken.check(qemu)?;
    let waiting = dir.processes().len();
    daemon.kill()?;
    taken.check(qemu)?;
    wait_for(SOON, "guests that waited to end", || {
        Ok((dir.processes().len() < waiting).then_some(()))
    })?;

    let daemon = Daemon::start(dir)?;
    let guests = daemon.get("/v1/guests")?;
    let of = |guest: &Value| (guest["id"].clone(), guest["qemu_pid"].clone());
    let known: Vec<_> = guests.as_array().ok_or("no list")?.iter().map(of).collect();
    assert_eq!(known, [(json!(taken.id), json!(taken.pid()))]);
    taken.check(qemu)?;
    daemon.wait_ready(2)?;
    // It goes back under the same id and name, at the same place.
    let (status, body) = daemon.request("POST", &format!("/v1/guests/{}/reset", taken.id), "")?;
    assert_eq!(status, 200, "{body}");
    let reset: Value = serde_json::from_str(&body)?;
    assert_eq!((&reset["how"], &reset["guest"]["id"]), (&json!("new_process"), &json!(taken.id)));
    taken = taken.now_in(&reset["guest"]["qemu_pid"])?;
    taken.check(qemu)?;
    // Ended as it should be, it leaves guests as well.
    daemon.end()?;
    taken.check(qemu)?;
    let daemon = Daemon::start(dir)?;
    daemon.ask(dir, &["release", &taken.id]).succeed()?;
    assert!(process_gone(taken.pid()) && !taken.folder.exists());
    daemon.end()
}

fn requests_beyond_the_most_wait_in_order(dir: &Dir) -> Result<()> {
    let daemon = Daemon::start(dir)?;
    daemon.pool(dir, Qemu::V10, 1, &["--max", "1", "--preload", "none"])?;
    let first = daemon.take(dir)?;
    let message = daemon.ask(dir, &["take", "booted", "--timeout", "0.1"]).end()?;
    assert_eq!(message.event("error")?["code"], "pool_exhausted", "{message:?}");
    assert_eq!((message.code, &message.event("error")?["retryable"]), (Some(1), &json!(true)));
    // Whoever asked first gets the next one.
    let mut second = daemon.ask(dir, &["take", "booted", "--name", "second"]).start()?;
    let queued = |number: u64| {
        wait_for(SOON, "the queue", || {
            Ok((daemon.get("/v1/pools/booted")?["waiting"] == number).then_some(()))
        })
    };
    queued(1)?;
    let third = daemon.ask(dir, &["take", "booted", "--name", "third"]).start()?;
    queued(2)?;
    // Who hangs up stands in the queue no more.
    let impatient = UnixStream::connect(&daemon.socket)?;
    let mut asking = impatient.try_clone()?;
    write!(asking, "POST /v1/pools/booted/take HTTP/1.1\r\nHost: x\r\n\r\n")?;
    queued(3)?;
    drop((impatient, asking));
    queued(2)?;
    daemon.ask(dir, &["release", &first.id]).succeed()?;
    let taken = Taken::of(&second.wait("running")?)?;
    queued(1)?;
    // By its name, as well.
    daemon.ask(dir, &["release", "second"]).succeed()?;
    assert!(process_gone(taken.pid()));
    let third = third.succeed()?;
    assert_eq!(third.event("running")?["name"], "third");
    daemon.ask(dir, &["pool", "remove", "booted"]).succeed()?;
    assert_eq!(daemon.get("/v1/guests")?, json!([]));
    let gone = daemon.ask(dir, &["take", "booted"]).end()?;
    assert_eq!(gone.event("error")?["code"], "no_such_pool");
    daemon.end()
}

fn a_pool_without_its_image_is_degraded_until_it_comes(dir: &Dir) -> Result<()> {
    let daemon = Daemon::start(dir)?;
    let image = dir.path("late.snap");
    daemon.ask(dir, &["pool", "create", "booted", text(&image)]).succeed()?;
    let pool = wait_for(SOON, "the pool to be degraded", || {
        let pool = daemon.get("/v1/pools/booted")?;
        Ok((pool["state"] == "degraded").then_some(pool))
    })?;
    assert_eq!(pool["problem"]["code"], "not_found", "{pool}");
    let refused = daemon.ask(dir, &["take", "booted", "--timeout", "0.1"]).end()?;
    assert_eq!(refused.event("error")?["code"], "pool_degraded", "{refused:?}");
    std::fs::copy(&shared(Qemu::V7)?.image, &image)?;
    daemon.wait_ready(1)?;
    let mut taken = daemon.take(dir)?;
    taken.check(Qemu::V7)?;
    daemon.ask(dir, &["release", &taken.id]).succeed()?;
    daemon.end()
}

fn a_guest_that_ends_by_itself_is_replaced(dir: &Dir) -> Result<()> {
    let daemon = Daemon::start(dir)?;
    daemon.pool(dir, Qemu::V10, 1, &[])?;
    let waiting = |not: u64| {
        wait_for(SOON, "another guest that waits", || {
            let runs = dir.snapback(&["ps"]).succeed()?.events;
            let pids = runs.iter().filter_map(|run| run["qemu_pid"].as_u64());
            Ok(pids.into_iter().find(|pid| *pid != not))
        })
    };
    let first = waiting(0)?;
    send_signal(first as u32, libc::SIGKILL);
    waiting(first)?;
    daemon.wait_ready(1)?;
    let mut taken = daemon.take(dir)?;
    taken.check(Qemu::V10)?;
    send_signal(taken.pid(), libc::SIGKILL);
    wait_for(SOON, "the guest to be forgotten", || {
        Ok((daemon.get("/v1/guests")? == json!([]) && !taken.folder.exists()).then_some(()))
    })?;
    daemon.end()
}

/// A guest that is taken is counted with all of its memory, and those beyond the limit wait.
fn no_more_guests_than_memory_allows(dir: &Dir) -> Result<()> {
    let daemon = Daemon::start(dir)?;
    let image = text(&shared(Qemu::V10)?.image);
    daemon.ask(dir, &["pool", "create", "booted", image, "--memory", "100"]).succeed()?;
    let pool = wait_for(SOON, "the pool to be degraded", || {
        let pool = daemon.get("/v1/pools/booted")?;
        Ok((pool["state"] == "degraded").then_some(pool))
    })?;
    assert!(
        pool["problem"]["message"].as_str().is_some_and(|m| m.contains("memory_mib")),
        "{pool}"
    );
    daemon.ask(dir, &["pool", "remove", "booted"]).succeed()?;

    daemon.pool(dir, Qemu::V10, 2, &["--memory", "400", "--preload", "none"])?;
    let guest = daemon.get("/v1/pools/booted")?["memory"]["guest"].as_u64().ok_or("no size")?;
    assert!(guest > (MIB + 64) << 20, "{guest}");
    let first = daemon.take(dir)?;
    let refused = daemon.ask(dir, &["take", "booted", "--timeout", "0.1"]).end()?;
    let error = refused.event("error")?;
    assert_eq!(error["code"], "pool_exhausted", "{refused:?}");
    assert!(error["message"].as_str().is_some_and(|m| m.contains("raise memory_mib")), "{error}");
    let pool = daemon.get("/v1/pools/booted")?;
    assert_eq!((&pool["running"], &pool["memory"]["limit"]), (&json!(1), &json!(400 << 20)));
    assert!(pool["used_bytes"].as_u64() > Some(0), "{pool}");
    // Who waits gets one as soon as one has been released, or there is room for more.
    let second = daemon.ask(dir, &["take", "booted"]).start()?;
    wait_for(SOON, "the queue", || {
        Ok((daemon.get("/v1/pools/booted")?["waiting"] == 1).then_some(()))
    })?;
    daemon.ask(dir, &["pool", "set", "booted", "--memory", "600"]).succeed()?;
    let second = Taken::of(second.succeed()?.event("running")?)?;
    daemon.ask(dir, &["release", &first.id]).succeed()?;
    daemon.ask(dir, &["release", &second.id]).succeed()?;
    daemon.end()
}

/// QEMU maps parts of a file from 8.1 on.
fn memory_is_shared_by_a_flat_copy(dir: &Dir) -> Result<()> {
    let daemon = Daemon::start(dir)?;
    daemon.pool(dir, Qemu::V10, 2, &["--share"])?;
    let mut guests = [daemon.take(dir)?, daemon.take(dir)?];
    for taken in &mut guests {
        taken.check(Qemu::V10)?;
    }
    let [mut first, second] = guests;
    for _ in 0..2 {
        let (_, body) = daemon.request("POST", &format!("/v1/guests/{}/reset", first.id), "")?;
        let reset: Value = serde_json::from_str(&body)?;
        assert_eq!(reset["how"], "in_place", "{reset}");
        first.guest.log = SerialLog::from_now(&first.folder.join("serial0.log"));
        first.check(Qemu::V10)?;
    }
    drop(second);
    daemon.ask(dir, &["pool", "remove", "booted"]).succeed()?;
    daemon.end()
}

fn everything_that_waits_is_in_place_where_that_was_asked_for(dir: &Dir) -> Result<()> {
    let daemon = Daemon::start(dir)?;
    daemon.pool(dir, Qemu::V10, 1, &["--preload", "all"])?;
    let mut taken = daemon.take(dir)?;
    taken.check(Qemu::V10)?;
    let guest = daemon.get(&format!("/v1/guests/{}", taken.id))?;
    assert_eq!(guest["present"], 1.0, "{guest}");
    daemon.ask(dir, &["release", &taken.id]).succeed()?;
    daemon.end()
}

fn a_daemon_keeps_its_pools(dir: &Dir) -> Result<()> {
    let daemon = Daemon::start(dir)?;
    daemon.pool(dir, Qemu::V10, 1, &["--max", "3"])?;
    daemon.ask(dir, &["pool", "set", "booted", "--armed", "2"]).succeed()?;
    daemon.wait_ready(2)?;
    let taken = daemon.take(dir)?;
    daemon.ask(dir, &["release", &taken.id]).succeed()?;
    daemon.kill()?;
    let daemon = Daemon::start(dir)?;
    daemon.wait_ready(2)?;
    let pool = daemon.get("/v1/pools/booted")?;
    assert_eq!((&pool["armed"], &pool["max"]), (&json!(2), &json!(3)));
    // Names are not used again.
    let later = daemon.take(dir)?;
    assert_ne!(later.folder, taken.folder);
    let twice = daemon.ask(dir, &["pool", "create", "booted", "/x"]).end()?;
    assert_eq!(twice.event("error")?["code"], "pool_exists");
    daemon.ask(dir, &["pool", "remove", "booted"]).succeed()?;
    assert!(process_gone(later.pid()));
    daemon.end()
}

fn one_daemon_at_a_time(dir: &Dir) -> Result<()> {
    let daemon = Daemon::start(dir)?;
    let (state, socket) = (dir.path("state"), format!("unix:{}", text(&daemon.socket)));
    let other = dir.path("other.sock");
    let other = format!("unix:{}", text(&other));
    for (state, listen, named) in
        [(&state, &other, "--state"), (&dir.path("another"), &socket, "--listen")]
    {
        let args = ["daemon", "--state", text(state), "--listen", listen];
        let message = dir.snapback(&args).fail()?;
        assert!(message.contains(named), "{message}");
    }
    daemon.end()?;
    let message = dir.snapback(&["pool", "list", "--socket", "/nowhere"]).fail()?;
    assert!(message.contains("snapback daemon"), "{message}");
    Ok(())
}

/// Sends each request of the OpenAPI document, and holds the answer against it.
fn answers_are_as_the_document_says(dir: &Dir) -> Result<()> {
    let daemon = Daemon::start(dir)?;
    daemon.pool(dir, Qemu::V10, 1, &[])?;
    let document = daemon.get("/v1/openapi.json")?;
    let validator = |schema: &Value| {
        let schema = json!({"allOf": [schema], "components": document["components"]});
        jsonschema::validator_for(&schema).map_err(|e| e.to_string())
    };
    let image = text(&shared(Qemu::V10)?.image);
    let other = json!({"name": "other", "image": image, "armed": 0}).to_string();
    let mut asked = 0;
    let mut check = |method: &str, path: &str, asks: &str, body: &str| -> Result<Value> {
        let described = &document["paths"][path][method];
        let (status, answer) = daemon.request(&method.to_uppercase(), asks, body)?;
        let expected = match &described["responses"][status.to_string()] {
            Value::Null => &described["responses"]["default"],
            expected => expected,
        };
        assert!(described.is_object(), "{method} {path} is not described");
        asked += usize::from(status < 300);
        let schema = &expected["content"]["application/json"]["schema"];
        if schema.is_null() {
            return Ok(Value::Null);
        }
        let answer: Value = serde_json::from_str(&answer)?;
        let wrong: Vec<_> =
            validator(schema)?.iter_errors(&answer).map(|e| e.to_string()).collect();
        assert!(wrong.is_empty(), "{method} {asks}: {wrong:?} in {answer}");
        Ok(answer)
    };
    check("get", "/v1/info", "/v1/info", "")?;
    check("get", "/v1/pools", "/v1/pools", "")?;
    check("post", "/v1/pools", "/v1/pools", &other)?;
    check("patch", "/v1/pools/{pool}", "/v1/pools/other", r#"{"max":2}"#)?;
    check("get", "/v1/pools/{pool}", "/v1/pools/other", "")?;
    check("delete", "/v1/pools/{pool}", "/v1/pools/other", "")?;
    let guest = check("post", "/v1/pools/{pool}/take", "/v1/pools/booted/take", "")?;
    check("get", "/v1/guests", "/v1/guests", "")?;
    let at = format!("/v1/guests/{}", guest["id"].as_str().ok_or("no id")?);
    check("get", "/v1/guests/{id}", &at, "")?;
    check("post", "/v1/guests/{id}/reset", &format!("{at}/reset"), "")?;
    check("delete", "/v1/guests/{id}", &at, "")?;
    check("get", "/metrics", "/metrics", "")?;
    check("get", "/", "/", "")?;
    check("get", "/v1/openapi.json", "/v1/openapi.json", "")?;
    // What is wrong is said in the same way everywhere.
    for (method, path, asks, body, code) in [
        ("delete", "/v1/guests/{id}", at.as_str(), "", "no_such_guest"),
        ("get", "/v1/pools/{pool}", "/v1/pools/none", "", "no_such_pool"),
        ("post", "/v1/pools", "/v1/pools", "{", "request_invalid"),
        ("post", "/v1/pools/{pool}/take", "/v1/pools/booted/take", "[]", "request_invalid"),
        ("post", "/v1/pools", "/v1/pools", r#"{"name":"../x","image":"/a"}"#, "request_invalid"),
        ("post", "/v1/pools", "/v1/pools", r#"{"name":"x","image":"a"}"#, "request_invalid"),
        ("post", "/v1/pools/{pool}/take", "/v1/pools/booted/take", r#"{"x":1}"#, "request_invalid"),
        (
            "post",
            "/v1/pools/{pool}/take",
            "/v1/pools/booted/take",
            r#"{"name":"../../etc"}"#,
            "request_invalid",
        ),
    ] {
        assert_eq!(check(method, path, asks, body)?["code"], code, "{method} {asks} {body}");
    }
    let described = document["paths"].as_object().ok_or("no paths")?;
    let described: usize =
        described.values().filter_map(|path| Some(path.as_object()?.len())).sum();
    // The stream of events has a test of its own.
    assert_eq!(asked, described - 1);
    let (status, body) = daemon.request("GET", "/v1/nothing", "")?;
    assert!(status == 404 && body.contains("openapi.json"), "{status} {body}");
    daemon.end()
}

/// The stream of events, each of which has to be as the OpenAPI document says.
fn what_happens_is_told_as_it_does(dir: &Dir) -> Result<()> {
    let daemon = Daemon::start(dir)?;
    let document = daemon.get("/v1/openapi.json")?;
    let stream = &document["paths"]["/v1/events"]["get"]["responses"]["200"]["content"];
    let schema = json!({
        "allOf": [stream["text/event-stream"]["schema"]], "components": document["components"],
    });
    let schema = jsonschema::validator_for(&schema).map_err(|e| e.to_string())?;
    let mut asking = UnixStream::connect(&daemon.socket)?;
    write!(asking, "GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")?;
    asking.set_read_timeout(Some(SOON))?;
    let mut lines = BufReader::new(asking.try_clone()?).lines();
    let mut told = |name: &str| -> Result<Value> {
        for line in lines.by_ref() {
            let line = line?;
            let Some(data) = line.strip_prefix("data: ") else { continue };
            let event: Value = serde_json::from_str(data)?;
            let wrong: Vec<_> = schema.iter_errors(&event).map(|e| e.to_string()).collect();
            assert!(wrong.is_empty() && event["unix_ms"].is_u64(), "{wrong:?} in {event}");
            if event["event"] == name {
                return Ok(event);
            }
        }
        Err(format!("the stream ended before it told `{name}`").into())
    };
    daemon.pool(dir, Qemu::V10, 1, &[])?;
    assert_eq!(told("pool")?["name"], "booted");
    let taken = daemon.take(dir)?;
    assert_eq!(told("taken")?["id"], taken.id.as_str());
    daemon.request("POST", &format!("/v1/guests/{}/reset", taken.id), "")?;
    assert_eq!(told("reset")?["id"], taken.id.as_str());
    daemon.ask(dir, &["release", &taken.id]).succeed()?;
    let released = told("released")?;
    assert_eq!((&released["id"], &released["why"]), (&json!(taken.id), &json!("asked")));
    daemon.ask(dir, &["pool", "remove", "booted"]).succeed()?;
    assert_eq!(told("removed")?["pool"], "booted");
    drop(asking);
    daemon.end()
}

/// The tests of the Python client that take a daemon, by the wheel that its users get.
fn the_python_client_and_its_examples_work(dir: &Dir) -> Result<()> {
    let token = token(dir)?;
    let address = format!("127.0.0.1:{}", crate::ports::free_port()?);
    let daemon = Daemon::with(dir, &["--http", &address, "--token-file", text(&token)])?;
    daemon.pool(dir, Qemu::V10, 2, &["--max", "6"])?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/python.sh");
    let mut tests = Command::new(script);
    tests.args(["test", "-q", "tests/test_daemon.py", "tests/test_ci.py"]);
    tests.env("SNAPBACK_SOCKET", &daemon.socket).env("SNAPBACK_TEST_POOL", "booted");
    tests.env("SNAPBACK_TEST_URL", format!("http://{address}")).env("SNAPBACK_TEST_TOKEN", TOKEN);
    let ended = tests.stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&ended.stdout);
    assert!(ended.status.success(), "{said}{}", String::from_utf8_lossy(&ended.stderr));
    assert!(!said.contains("skipped"), "{said}");
    daemon.ask(dir, &["pool", "remove", "booted"]).succeed()?;
    daemon.end()
}

/// What the daemon's token is in these tests.
const TOKEN: &str = "0123456789abcdef0123";

/// The file of that token.
fn token(dir: &Dir) -> Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let token = dir.path("token");
    std::fs::write(&token, TOKEN)?;
    std::fs::set_permissions(&token, PermissionsExt::from_mode(0o600))?;
    Ok(token)
}

fn who_comes_by_tcp_needs_the_token(dir: &Dir) -> Result<()> {
    let message = dir.snapback(&["daemon", "--http", "127.0.0.1:0"]).fail()?;
    assert!(message.contains("--token-file"), "{message}");
    let token = token(dir)?;
    let address = format!("127.0.0.1:{}", crate::ports::free_port()?);
    let daemon = Daemon::with(dir, &["--http", &address, "--token-file", text(&token)])?;
    let by_tcp = |method: &str, path: &str, headers: &str, body: &str| -> Result<(u16, String)> {
        http_request(std::net::TcpStream::connect(&address)?, method, path, headers, body)
    };
    let (status, body) = by_tcp("GET", "/v1/pools", "", "")?;
    assert!(status == 401 && body.contains("unauthorized"), "{status} {body}");
    let wrong = "Authorization: Bearer 0123456789abcdef0124\r\n";
    assert_eq!(by_tcp("GET", "/v1/pools", wrong, "")?.0, 401);
    let right = "Authorization: Bearer 0123456789abcdef0123\r\n";
    let (status, body) = by_tcp("GET", "/v1/pools", right, "")?;
    assert_eq!((status, body.as_str()), (200, "[]"));
    // What a pool is made of names programs and files.
    let pool = r#"{"name":"x","image":"/a","qemu":"/bin/sh"}"#;
    let (status, body) = by_tcp("POST", "/v1/pools", right, pool)?;
    assert!(status == 403 && body.contains("forbidden"), "{status} {body}");
    assert_eq!(by_tcp("GET", "/", "", "")?.0, 200);
    daemon.end()
}
