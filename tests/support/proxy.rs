//! A proxy before an HTTP server that makes the network between what it can be: far, narrow, broken.
//!
//! It understands as much of HTTP/1.1 as it takes to tell one request from the next, so that it can
//! fail the one that a test means.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::Result;

/// How much is passed on at once.
const PIECE: usize = 64 << 10;

/// What is done to a request instead of answering it as the server does.
#[derive(Debug, Clone, PartialEq)]
pub enum Fault {
    /// An answer with this status and body, without asking the server.
    Status(u16, &'static str),
    /// The connection is closed once the request has been read.
    Drop,
    /// The answer ends after so many bytes of its body, and the connection with it.
    Truncate(u64),
    /// A bit of the body's byte at this place is flipped.
    Alter(u64),
    /// The answer waits for so long.
    Stall(Duration),
    /// Of a listing, all that has this in its key is left out.
    Hide(String),
}

/// A fault, and which requests it happens to.
struct Rule {
    method: String,
    path: String,
    fault: Fault,
    times: u64,
}

/// What the network is like.
#[derive(Default)]
struct Network {
    latency: Duration,
    /// Bytes a second, and when the next may pass.
    rate: Option<(u64, Instant)>,
    rules: Vec<Rule>,
}

#[derive(Default)]
struct Shared {
    network: Mutex<Network>,
    down: AtomicBool,
    ended: AtomicBool,
    requests: AtomicU64,
    /// Bytes of bodies, to the client and to the server.
    received: AtomicU64,
    sent: AtomicU64,
    log: Mutex<Vec<String>>,
}

/// A proxy that runs until it is dropped.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Starts one before a server.
    ///
    /// # Errors
    /// When it can't listen.
    pub fn start(server: SocketAddr) -> Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let (address, shared) = (listener.local_addr()?, Arc::new(Shared::default()));
        let of = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming() {
                if of.ended.load(Ordering::Relaxed) {
                    return;
                }
                let (Ok(client), of) = (client, Arc::clone(&of)) else { continue };
                thread::spawn(move || {
                    // A connection that breaks is what this is for.
                    let _ = serve(client, server, &of);
                });
            }
        });
        Ok(Proxy { address, shared })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Every answer takes so much longer.
    pub fn set_latency(&self, latency: Duration) {
        self.shared.network.lock().unwrap().latency = latency;
    }

    /// All connections together move so many bytes a second.
    pub fn set_rate(&self, bytes_a_second: Option<u64>) {
        let rate = bytes_a_second.map(|rate| (rate, Instant::now()));
        self.shared.network.lock().unwrap().rate = rate;
    }

    /// No connection lasts, and no other comes about.
    pub fn set_down(&self, down: bool) {
        self.shared.down.store(down, Ordering::Relaxed);
    }

    /// The next so many requests of this method whose path holds this go wrong.
    pub fn fail(&self, method: &str, path: &str, times: u64, fault: Fault) {
        let (method, path) = (method.to_owned(), path.to_owned());
        self.shared.network.lock().unwrap().rules.push(Rule { method, path, fault, times });
    }

    /// No request goes wrong from now on.
    pub fn heal(&self) {
        self.set_down(false);
        self.shared.network.lock().unwrap().rules.clear();
    }

    /// Requests so far.
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// Bytes of answers' bodies so far, and of requests'.
    pub fn bytes(&self) -> (u64, u64) {
        let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
        (count(&self.shared.received), count(&self.shared.sent))
    }

    /// The requests since this was last asked for: their methods and paths.
    pub fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.log.lock().unwrap())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    /// What happens to this request.
    fn fault(&self, method: &str, path: &str) -> Option<Fault> {
        let mut network = self.network.lock().unwrap();
        let meant =
            |rule: &&mut Rule| rule.times > 0 && rule.method == method && path.contains(&rule.path);
        let rule = network.rules.iter_mut().find(meant)?;
        rule.times -= 1;
        Some(rule.fault.clone())
    }

    /// Waits until so many bytes may pass.
    fn pass(&self, bytes: usize) {
        let due = {
            let mut network = self.network.lock().unwrap();
            let Some((rate, next)) = &mut network.rate else { return };
            let takes = Duration::from_secs_f64(bytes as f64 / *rate as f64);
            *next = (*next).max(Instant::now()) + takes;
            *next
        };
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

/// The head of a request or an answer.
struct Head {
    lines: Vec<String>,
    length: Option<u64>,
    chunked: bool,
}

impl Head {
    /// Reads one, unless the connection has ended.
    fn read(from: &mut impl BufRead) -> Result<Option<Head>> {
        let (mut lines, mut length, mut chunked) = (Vec::new(), None, false);
        loop {
            let mut line = String::new();
            if from.read_line(&mut line)? == 0 {
                return Ok(None);
            }
            let line = line.trim_end().to_owned();
            if line.is_empty() {
                break;
            }
            let lower = line.to_ascii_lowercase();
            if let Some(value) = lower.strip_prefix("content-length:") {
                length = Some(value.trim().parse()?);
            }
            chunked |= lower.starts_with("transfer-encoding:") && lower.contains("chunked");
            lines.push(line);
        }
        Ok(Some(Head { lines, length, chunked }))
    }

    fn write(&self, to: &mut impl Write) -> Result<()> {
        let head = self.lines.iter().map(|line| format!("{line}\r\n")).collect::<String>();
        Ok(to.write_all(format!("{head}\r\n").as_bytes())?)
    }
}

/// Serves a connection, request by request.
fn serve(client: TcpStream, server: SocketAddr, shared: &Shared) -> Result<()> {
    client.set_nodelay(true)?;
    client.set_read_timeout(Some(Duration::from_millis(200)))?;
    let mut to_client = client.try_clone()?;
    let mut from_client = BufReader::new(client);
    let mut upstream: Option<(TcpStream, BufReader<TcpStream>)> = None;
    loop {
        // Between two requests it looks whether the network is down.
        match from_client.fill_buf() {
            Ok([]) => return Ok(()),
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                match shared.down.load(Ordering::Relaxed) || shared.ended.load(Ordering::Relaxed) {
                    true => return Ok(()),
                    false => continue,
                }
            }
            Err(e) => return Err(e.into()),
        }
        if shared.down.load(Ordering::Relaxed) {
            return Ok(());
        }
        from_client.get_ref().set_read_timeout(Some(Duration::from_secs(60)))?;
        let Some(request) = Head::read(&mut from_client)? else { return Ok(()) };
        let mut words = request.lines[0].split(' ');
        let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        shared.requests.fetch_add(1, Ordering::Relaxed);
        shared.log.lock().unwrap().push(format!("{method} {path}"));
        let fault = shared.fault(method, path);
        if upstream.is_none() {
            let stream = TcpStream::connect(server)?;
            stream.set_nodelay(true)?;
            upstream = Some((stream.try_clone()?, BufReader::new(stream)));
        }
        let (to_server, from_server) = upstream.as_mut().ok_or("no server")?;
        let is_answered = matches!(fault, Some(Fault::Status(..) | Fault::Drop));
        let mut nobody = std::io::sink();
        let to: &mut dyn Write = if is_answered { &mut nobody } else { to_server };
        let mut to = to;
        request.write(&mut to)?;
        let length = request.length.unwrap_or(0);
        copy(&mut from_client, &mut to, length, shared, &shared.sent, &mut None)?;
        let latency = shared.network.lock().unwrap().latency;
        thread::sleep(latency);
        match &fault {
            Some(Fault::Drop) => return Ok(()),
            Some(Fault::Status(status, body)) => {
                let length = if method == "HEAD" { 0 } else { body.len() };
                let body = &body[..length];
                write!(
                    to_client,
                    "HTTP/1.1 {status} Fault\r\nContent-Length: {length}\r\n\r\n{body}"
                )?;
                from_client.get_ref().set_read_timeout(Some(Duration::from_millis(200)))?;
                continue;
            }
            Some(Fault::Stall(time)) => thread::sleep(*time),
            _ => {}
        }
        let Some(mut answer) = Head::read(from_server)? else { return Ok(()) };
        let status = answer.lines[0].split(' ').nth(1).unwrap_or("").to_owned();
        let has_body = method != "HEAD" && !matches!(status.as_str(), "204" | "304");
        if let (Some(Fault::Hide(hidden)), true) = (&fault, has_body) {
            let body = whole(from_server, &answer)?;
            let body = hide(&String::from_utf8(body)?, hidden);
            answer.lines.retain(|line| {
                let line = line.to_ascii_lowercase();
                !line.starts_with("content-length:") && !line.starts_with("transfer-encoding:")
            });
            answer.lines.push(format!("Content-Length: {}", body.len()));
            answer.write(&mut to_client)?;
            to_client.write_all(body.as_bytes())?;
        } else {
            answer.write(&mut to_client)?;
            let mut left = match &fault {
                Some(Fault::Truncate(len)) => Some(Cut { len: *len, alter: false }),
                Some(Fault::Alter(at)) => Some(Cut { len: *at, alter: true }),
                _ => None,
            };
            let is_whole = match (has_body, answer.chunked) {
                (false, _) => true,
                (true, false) => {
                    let length = answer.length.unwrap_or(0);
                    copy(from_server, &mut to_client, length, shared, &shared.received, &mut left)?
                }
                (true, true) => {
                    let body = chunks(from_server)?;
                    shared.received.fetch_add(body.len() as u64, Ordering::Relaxed);
                    shared.pass(body.len());
                    to_client.write_all(&body)?;
                    true
                }
            };
            if !is_whole {
                return Ok(());
            }
        }
        if shared.down.load(Ordering::Relaxed) {
            return Ok(());
        }
        from_client.get_ref().set_read_timeout(Some(Duration::from_millis(200)))?;
    }
}

/// What is done to a body behind so many bytes.
struct Cut {
    len: u64,
    alter: bool,
}

/// Passes a body on. Tells whether all of it was.
fn copy(
    from: &mut impl Read,
    to: &mut (impl Write + ?Sized),
    length: u64,
    shared: &Shared,
    count: &AtomicU64,
    cut: &mut Option<Cut>,
) -> Result<bool> {
    let (mut piece, mut done) = (vec![0; PIECE], 0);
    while done < length {
        let len = (length - done).min(PIECE as u64) as usize;
        let read = from.read(&mut piece[..len])?;
        if read == 0 || shared.down.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let mut bytes = &mut piece[..read];
        match cut {
            Some(Cut { len, alter: true }) if (done..done + read as u64).contains(len) => {
                bytes[(*len - done) as usize] ^= 1;
            }
            Some(Cut { len, alter: false }) if done + read as u64 >= *len => {
                bytes = &mut bytes[..(*len - done) as usize];
                to.write_all(bytes)?;
                return Ok(false);
            }
            _ => {}
        }
        shared.pass(bytes.len());
        to.write_all(bytes)?;
        count.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        done += read as u64;
    }
    Ok(true)
}

/// A body in chunks, as it comes.
fn chunks(from: &mut impl BufRead) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let mut line = String::new();
        from.read_line(&mut line)?;
        body.extend(line.as_bytes());
        let len = usize::from_str_radix(line.trim_end().split(';').next().unwrap_or(""), 16)?;
        let at = body.len();
        body.resize(at + len + 2, 0);
        from.read_exact(&mut body[at..])?;
        if len == 0 {
            return Ok(body);
        }
    }
}

/// A body as a whole, without its chunks.
fn whole(from: &mut impl BufRead, head: &Head) -> Result<Vec<u8>> {
    if !head.chunked {
        let mut body = vec![0; head.length.unwrap_or(0) as usize];
        from.read_exact(&mut body)?;
        return Ok(body);
    }
    let mut body = Vec::new();
    loop {
        let mut line = String::new();
        from.read_line(&mut line)?;
        let len = usize::from_str_radix(line.trim_end(), 16)?;
        let at = body.len();
        body.resize(at + len, 0);
        from.read_exact(&mut body[at..])?;
        from.read_line(&mut line)?;
        if len == 0 {
            return Ok(body);
        }
    }
}

/// A listing without the objects that have this in their keys.
fn hide(listing: &str, hidden: &str) -> String {
    let mut parts = listing.split("<Contents>");
    let mut kept = parts.next().unwrap_or("").to_owned();
    for part in parts {
        let (object, rest) = part.split_once("</Contents>").unwrap_or((part, ""));
        if !object.contains(hidden) {
            kept.push_str(&format!("<Contents>{object}</Contents>"));
        }
        kept.push_str(rest);
    }
    kept
}
