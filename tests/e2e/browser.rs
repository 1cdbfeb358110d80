//! A headless Chromium, driven by its DevTools protocol through a pair of pipes.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use serde_json::{Value, json};

use crate::harness::{Dir, text};
use crate::support::{Result, SOON, spawn_bound, wait_for};

/// Of the package chromium-headless-shell.
const PROGRAM: &str = "chromium-headless-shell";

/// A browser with one page. Dropping it ends it.
pub struct Browser {
    child: Child,
    orders: Option<ChildStdin>,
    messages: Receiver<Value>,
    calls: u64,
    session: Value,
    complaints: Vec<String>,
}

/// A key that does something.
#[derive(Clone, Copy)]
pub enum Key {
    Tab,
    Enter,
    Escape,
}

impl Browser {
    pub fn start(dir: &Dir) -> Result<Browser> {
        // The protocol is spoken on the descriptors 3 and 4. The page is our own: no sandbox,
        // which root and most containers could not have.
        let mut command = Command::new("sh");
        command.args(["-c", "exec \"$@\" 3<&0 4>&1 0</dev/null 1>&2", "sh", PROGRAM]);
        command.args(["--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"]);
        command.args(["--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run"]);
        command.arg(format!("--user-data-dir={}", text(&dir.make("browser")?)));
        command.env("HOME", dir.path("browser"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = spawn_bound(command)?;
        let (orders, said) = (child.stdin.take(), child.stdout.take().unwrap());
        let (sender, messages) = channel();
        std::thread::spawn(move || {
            for message in BufReader::new(said).split(0).map_while(|message| message.ok()) {
                let Ok(message) = serde_json::from_slice(&message) else { return };
                if sender.send(message).is_err() {
                    return;
                }
            }
        });
        let (calls, session, complaints) = (0, Value::Null, Vec::new());
        let mut browser = Browser { child, orders, messages, calls, session, complaints };
        let page = browser.call("Target.createTarget", json!({"url": "about:blank"}));
        let page = page.map_err(|e| format!("{PROGRAM}: {e}; `make setup` installs it"))?;
        let attach = json!({"targetId": page["targetId"], "flatten": true});
        browser.session = browser.call("Target.attachToTarget", attach)?["sessionId"].clone();
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({}))?;
        }
        browser.call("Emulation.setFocusEmulationEnabled", json!({"enabled": true}))?;
        Ok(browser)
    }

    /// Calls a method of the protocol.
    fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        self.calls += 1;
        let mut order = json!({"id": self.calls, "method": method, "params": params});
        if !self.session.is_null() {
            order["sessionId"] = self.session.clone();
        }
        let orders = self.orders.as_mut().ok_or("it has been ended")?;
        orders.write_all(format!("{order}\0").as_bytes())?;
        loop {
            let message = self.messages.recv_timeout(SOON);
            let mut message = message.map_err(|error| format!("{method}: {error}"))?;
            if message["id"] != self.calls {
                self.hear(&message);
            } else if message["error"].is_null() {
                return Ok(message["result"].take());
            } else {
                return Err(format!("{method}: {}", message["error"]).into());
            }
        }
    }

    fn hear(&mut self, message: &Value) {
        let params = &message["params"];
        let complaint = match message["method"].as_str() {
            Some("Runtime.exceptionThrown") => &params["exceptionDetails"],
            Some("Runtime.consoleAPICalled") => params,
            // That a request failed is shown by the page itself.
            Some("Log.entryAdded") if params["entry"]["source"] != "network" => &params["entry"],
            _ => return,
        };
        self.complaints.push(complaint.to_string());
    }

    /// What the page has written to the console, what was thrown and not caught, what its policy
    /// has kept it from.
    pub fn complaints(&self) -> &[String] {
        &self.complaints
    }

    /// Opens a page. Another fragment alone does not load it again.
    pub fn open(&mut self, url: &str) -> Result<()> {
        self.call("Page.navigate", json!({"url": url}))?;
        self.wait("the page to be loaded", "document.readyState === 'complete'")
    }

    /// The size of the window and the colours that its user prefers.
    pub fn view(&mut self, width: u32, height: u32, dark: bool, still: bool) -> Result<()> {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1,
            "mobile": width < 600});
        self.call("Emulation.setDeviceMetricsOverride", size)?;
        let scheme = if dark { "dark" } else { "light" };
        let motion = if still { "reduce" } else { "no-preference" };
        let features = json!([{"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": motion}]);
        self.call("Emulation.setEmulatedMedia", json!({"features": features}))?;
        // What follows the size is drawn in the frame after.
        let frames =
            "new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn)))";
        self.value(frames).map(drop)
    }

    /// The value of an expression, once it has one where it is a promise.
    pub fn value(&mut self, expression: &str) -> Result<Value> {
        let params = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let mut answer = self.call("Runtime.evaluate", params)?;
        match answer["exceptionDetails"].is_null() {
            true => Ok(answer["result"]["value"].take()),
            false => Err(format!("{expression}: {}", answer["exceptionDetails"]).into()),
        }
    }

    /// Waits until an expression is true.
    pub fn wait(&mut self, what: &str, expression: &str) -> Result<()> {
        let came = wait_for(SOON, what, || {
            // A page that is left in the meantime has no answer.
            Ok((self.value(expression).ok() == Some(json!(true))).then_some(()))
        });
        came.map_err(|error| match self.value("document.body.innerText") {
            Ok(shown) => format!("{error}; the page shows {shown}").into(),
            Err(_) => error,
        })
    }

    /// Clicks into the middle of the element that an expression names, where nothing covers it.
    pub fn click(&mut self, element: &str) -> Result<()> {
        let place = self.value(&format!(
            "(() => {{
                const element = {element};
                element.scrollIntoView({{ block: 'center', behavior: 'instant' }});
                const box = element.getBoundingClientRect();
                const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
                return {{ x, y, free: element.contains(document.elementFromPoint(x, y)) }};
            }})()"
        ))?;
        if place["free"] != true {
            return Err(format!("{element} can't be clicked at {place}").into());
        }
        for kind in ["mousePressed", "mouseReleased"] {
            let event = json!({"type": kind, "x": place["x"], "y": place["y"], "button": "left",
                "clickCount": 1});
            self.call("Input.dispatchMouseEvent", event)?;
        }
        Ok(())
    }

    pub fn press(&mut self, key: Key) -> Result<()> {
        let (name, code, typed) = match key {
            Key::Tab => ("Tab", 9, None),
            Key::Enter => ("Enter", 13, Some("\r")),
            Key::Escape => ("Escape", 27, None),
        };
        for kind in ["keyDown", "keyUp"] {
            let mut event = json!({"type": kind, "key": name, "code": name,
                "windowsVirtualKeyCode": code});
            if let (Some(typed), "keyDown") = (typed, kind) {
                event["text"] = json!(typed);
            }
            self.call("Input.dispatchKeyEvent", event)?;
        }
        Ok(())
    }

    pub fn write(&mut self, text: &str) -> Result<()> {
        self.call("Input.insertText", json!({"text": text})).map(drop)
    }

    /// The roles and names of what a screen reader is told of the page.
    pub fn accessible(&mut self) -> Result<Vec<(String, String)>> {
        let tree = self.call("Accessibility.getFullAXTree", json!({}))?;
        let nodes = tree["nodes"].as_array().ok_or("no tree")?;
        let said = |value: &Value| value["value"].as_str().unwrap_or_default().to_owned();
        let nodes = nodes.iter().filter(|node| node["ignored"] != true);
        Ok(nodes.map(|node| (said(&node["role"]), said(&node["name"]))).collect())
    }

    /// Writes a picture of the whole page.
    pub fn picture(&mut self, path: &Path) -> Result<()> {
        let picture = json!({"captureBeyondViewport": true});
        let shot = self.call("Page.captureScreenshot", picture)?;
        use base64::Engine;
        let shot = shot["data"].as_str().ok_or("no picture")?;
        std::fs::write(path, base64::prelude::BASE64_STANDARD.decode(shot)?)?;
        Ok(())
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It ends with its orders; the program is a script that waits for it.
        drop(self.orders.take());
        let ended = wait_for(SOON, "the browser to end", || Ok(self.child.try_wait()?));
        if ended.is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
