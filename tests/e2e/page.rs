//! The daemon's status page in a real browser: what it shows, and what can be done with it by
//! mouse, by keyboard, on a phone and in the dark.
//!
//! SNAPBACK_TEST_PICTURES=DIR keeps pictures of what was seen.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::browser::{Browser, Key};
use crate::harness::{Dir, text};
use crate::pools::Daemon;
use crate::support::{Qemu, Result};
use crate::tests;

tests! {
    pools_are_used_by_the_status_page
}

const TOKEN: &str = "0123456789abcdef0123";

/// The image of a pool that can't start guests. Nobody who reads its name should run it.
const HOSTILE: &str = "/nowhere/<img src=x onerror=alert(1)>.snap";

/// How the page is looked at, and by what it is used.
struct View {
    name: &'static str,
    size: (u32, u32),
    dark: bool,
    by_keyboard: bool,
}

const VIEWS: [View; 4] = [
    View { name: "wide-light-mouse", size: (1280, 800), dark: false, by_keyboard: false },
    View { name: "phone-dark-keyboard", size: (360, 740), dark: true, by_keyboard: true },
    View { name: "phone-light-mouse", size: (360, 740), dark: false, by_keyboard: false },
    View { name: "wide-dark-keyboard", size: (1280, 800), dark: true, by_keyboard: true },
];

fn pools_are_used_by_the_status_page(dir: &Dir) -> Result<()> {
    let token = dir.path("token");
    std::fs::write(&token, TOKEN)?;
    std::fs::set_permissions(&token, PermissionsExt::from_mode(0o600))?;
    let address = format!("127.0.0.1:{}", crate::ports::free_port()?);
    let options = ["--http", &address, "--token-file", text(&token)];
    let daemon = Daemon::with(dir, &options)?;
    daemon.pool(dir, Qemu::V10, 2, &["--max", "4"])?;
    daemon.ask(dir, &["pool", "create", "broken", HOSTILE]).succeed()?;

    let mut page = Page { browser: Browser::start(dir)?, address: address.clone() };
    page.browser.view(1280, 800, false, false)?;
    page.asks_for_the_token()?;
    page.is_fenced_in()?;
    for view in &VIEWS {
        page.is_used(view).map_err(|error| format!("{}: {error}", view.name))?;
    }
    page.fits_everywhere()?;
    page.keeps_the_focus(&daemon)?;

    // A daemon that is started again is found again, with the guests that have run on.
    page.act("Take a guest of booted", false)?;
    page.browser.wait("a guest", "guests.rows.length === 1")?;
    let pid = page.browser.value("daemon.textContent")?;
    let guest = daemon.get("/v1/guests")?[0]["id"].clone();
    daemon.kill()?;
    page.browser.wait("the loss", "link.textContent.includes('Connection lost')")?;
    page.browser.wait("what comes next", "link.innerText.includes('Next in')")?;
    page.picture("lost")?;
    page.browser.view(360, 740, true, false)?;
    assert_eq!(page.browser.value(OVERFLOWS)?, json!([]));
    page.picture("lost-phone")?;
    // Ahead of the daemon, which the page may find by itself before the keyboard gets there.
    page.reach("Try now")?;
    let daemon = Daemon::with(dir, &options)?;
    page.browser.press(Key::Enter)?;
    let back = format!(
        "link.className === 'live' && daemon.textContent !== {pid} && !!daemon.textContent"
    );
    page.browser.wait("the other daemon", &back)?;
    let there = format!("guests.rows.length === 1 && guests.innerText.includes({guest})");
    page.browser.wait("the guest", &there)?;
    page.act("Release booted", false)?;
    page.act("Release", false)?;
    page.browser.wait("the end of the guest", "guests.rows.length === 0")?;

    // Errors are told with their codes.
    daemon.ask(dir, &["pool", "remove", "broken"]).succeed()?;
    page.browser.wait("the pool to be gone", "pools.rows.length === 1")?;
    page.browser.wait(
        "an error",
        "take('broken').then(() => messages.innerText.includes('no_such_pool: '))",
    )?;
    let twice = "take('broken').then(() => messages.querySelectorAll('.bad').length)";
    assert_eq!(page.browser.value(twice)?, 1);
    page.picture("error")?;
    page.act("Forget the token", false)?;
    page.browser
        .wait("the field", "document.activeElement === at('token') && !shown.checkVisibility()")?;
    assert_eq!(page.browser.complaints(), [""; 0]);
    drop(page);
    daemon.end()
}

struct Page {
    browser: Browser,
    address: String,
}

impl Page {
    fn open(&mut self, fragment: &str) -> Result<()> {
        // The same page with another fragment is not loaded again.
        self.browser.open("about:blank")?;
        self.browser.open(&format!("http://{}/{fragment}", self.address))
    }

    fn asks_for_the_token(&mut self) -> Result<()> {
        self.open("")?;
        let asked = "at('locked').checkVisibility() && !shown.checkVisibility() && \
             document.activeElement === at('token') && at('token').type === 'password'";
        self.browser.wait("the field of the token", asked)?;
        self.picture("token")?;
        self.browser.write("0123456789abcdef0124")?;
        self.browser.press(Key::Enter)?;
        let wrong = "at('locked').innerText.includes('does not know this token')";
        self.browser.wait("a word on the wrong token", &format!("{wrong} && {asked}"))?;
        self.browser.write(TOKEN)?;
        self.browser.press(Key::Enter)?;
        let open = "pools.rows.length === 2 && !at('locked').checkVisibility() && link.className === 'live'";
        self.browser.wait("the pools", open)?;
        // It is asked for once.
        self.browser.open(&format!("http://{}/", self.address))?;
        self.browser.wait("the pools once more", open)?;
        let leave = "sessionStorage.clear()";
        self.browser.value(leave)?;
        self.open(&format!("#token={TOKEN}"))?;
        self.browser.wait("the pools by the address", open)?;
        assert_eq!(self.browser.value("location.href")?, format!("http://{}/", self.address));
        Ok(())
    }

    /// What the page may do, and what names in it can't.
    fn is_fenced_in(&mut self) -> Result<()> {
        let headers = self.browser.value("fetch('/').then(a => Object.fromEntries(a.headers))")?;
        let policy = headers["content-security-policy"].as_str().ok_or("no policy")?;
        for part in ["default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'"] {
            assert!(policy.contains(part), "{policy}");
        }
        assert_eq!(
            (&headers["x-content-type-options"], &headers["referrer-policy"]),
            (&json!("nosniff"), &json!("no-referrer"))
        );
        let told = "pools.querySelector('.problem:not([hidden])')";
        self.browser.wait("the problem", &format!("!!{told}?.checkVisibility()"))?;
        let told = self.browser.value(&format!("{told}.innerText"))?;
        assert!(told.as_str().is_some_and(|told| told.contains("not_found")), "{told}");
        assert!(told.as_str().is_some_and(|told| told.contains("<img src=x")), "{told}");
        assert_eq!(self.browser.value("document.images.length")?, 0);
        Ok(())
    }

    /// Takes, resets and releases a guest.
    fn is_used(&mut self, view: &View) -> Result<()> {
        let ((width, height), by_keyboard) = (view.size, view.by_keyboard);
        self.browser.view(width, height, view.dark, false)?;
        self.act("Take a guest of booted", by_keyboard)?;
        self.browser.wait("the guest", "guests.rows.length === 1")?;
        self.browser.wait("a word on it", "messages.innerText.includes('Took booted-')")?;
        assert_eq!(self.focused()?, "Take a guest of booted");
        let tracked = "guests.rows[0].innerText.includes('in its QEMU') && \
             guests.rows[0].innerText.includes('100 %')";
        self.browser.wait("its writes to be tracked", tracked)?;
        self.act("Copy the path of booted", by_keyboard)?;
        let copied = "messages.innerText.includes('The path is copied')";
        self.browser.wait("a word on the copy", copied)?;
        self.act("Reset booted", by_keyboard)?;
        let word = "/Reset booted-\\d+ in its QEMU in [\\d.]+ m?s/.test(messages.innerText)";
        self.browser.wait("a word on the reset", word)?;
        self.browser.wait("its count", "guests.rows[0].cells[5].innerText === '1'")?;
        // Its row has been written anew, and is the same.
        assert!(self.focused()?.starts_with("Reset booted"));
        let seen = "at('figures').rows[0].cells[1].innerText >= 1 && at('figures').rows[1].cells[1].innerText >= 1";
        self.browser.wait("latencies", seen)?;
        assert_eq!(self.browser.value("drawn.querySelectorAll('use').length")?, self.seen()?);
        self.is_sound(width)?;
        self.picture(view.name)?;

        self.act("Release booted", by_keyboard)?;
        self.browser.wait("the question", "sure.open")?;
        assert_eq!(self.focused()?, "Keep it");
        self.is_sound(width)?;
        self.picture(&format!("{}-release", view.name))?;
        self.browser.press(Key::Escape)?;
        self.browser.wait("the question to be gone", "!sure.open")?;
        assert!(self.focused()?.starts_with("Release booted"));
        assert_eq!(self.browser.value("guests.rows.length")?, 1);
        self.act("Release booted", by_keyboard)?;
        self.browser.wait("the question", "sure.open")?;
        self.act("Release", by_keyboard)?;
        let gone = "guests.rows.length === 0 && messages.innerText.includes('Released booted-')";
        self.browser.wait("the guest to be gone", gone)?;
        // Whoever was at its row is not thrown back to the start of the page.
        assert_eq!(self.focused()?, "Guests that are taken");
        Ok(())
    }

    /// How many latencies this page has seen.
    fn seen(&mut self) -> Result<Value> {
        self.browser.value(
            "[...at('figures').rows].reduce((n, row) => n + (+row.cells[1].innerText || 0), 0)",
        )
    }

    /// Nothing is cut off, too pale, or without a name.
    fn is_sound(&mut self, width: u32) -> Result<()> {
        assert_eq!(self.browser.value("document.documentElement.clientWidth")?, width);
        assert_eq!(self.browser.value(OVERFLOWS)?, json!([]));
        assert_eq!(self.browser.value(PALE)?, json!([]));
        let told = self.browser.accessible()?;
        let named = |role: &str| {
            told.iter()
                .filter(|(r, _)| r == role)
                .map(|(_, name)| name.as_str())
                .collect::<Vec<_>>()
        };
        if self.browser.value("sure.open")? == true {
            // All else is out of reach.
            assert_eq!(named("dialog"), ["Release the guest?"]);
            assert_eq!(named("button"), ["Keep it", "Release"]);
            return Ok(());
        }
        let title = "Takes and resets since this page was opened";
        assert_eq!(named("table"), ["Pools", "Guests that are taken", title]);
        assert_eq!(named("columnheader").len(), 7 + 10 + 5);
        assert_eq!(named("row").len(), 3 + 2 + 4);
        assert_eq!((named("log"), named("status").len()), (vec!["Messages"], 1));
        let buttons = named("button");
        assert!(buttons.iter().all(|name| !name.is_empty()), "{buttons:?}");
        for name in ["Take a guest of booted", "Take a guest of broken"] {
            assert!(buttons.contains(&name), "{buttons:?}");
        }
        Ok(())
    }

    /// Nothing has to be scrolled to the side, down to the smallest phone, with the longest names;
    /// nothing moves for those who don't want that.
    fn fits_everywhere(&mut self) -> Result<()> {
        let name = "W".repeat(32);
        let pool = json!({"name": name, "image": format!("/{}", "i".repeat(200)),
            "state": "degraded", "problem": {"code": "x", "message": "m".repeat(300)},
            "armed": 10_000, "ready": 10_000, "max": 10_000, "running": 10_000,
            "waiting": 10_000, "takes": 1_000_000_000, "resettable": true});
        let guest = json!({"id": "<b>1f0c92ab</b>", "pool": name, "name": name,
            "qemu_pid": 4_194_304, "qmp": "/".repeat(107), "age_s": 1e7, "resets": 1_000_000,
            "ports": {"2222": 40_731, "8080": 40_732, "65535": 65_535}, "resettable": false});
        // As soon as the lists are read again this is gone: shown and measured at once.
        let shown = format!("show([{pool}], [{guest}]), guests.innerText");
        let told = self.browser.value(&shown)?;
        let told = told.as_str().unwrap_or_default();
        for part in [
            "<b>1f0c92ab</b>",
            "2222\u{a0}→\u{a0}40731, 8080\u{a0}→\u{a0}40732",
            "not known",
            "115 d 17 h",
        ] {
            assert!(told.contains(part), "{told}");
        }
        for width in [320, 480, 700, 1024, 1216, 1217, 1280, 1920] {
            self.browser.view(width, 700, false, true)?;
            let overflows =
                self.browser.value(&format!("show([{pool}], [{guest}]), {OVERFLOWS}"))?;
            assert_eq!(overflows, json!([]), "at {width}");
            self.picture(&format!("at-{width}"))?;
        }
        // A row that has just come.
        let moving = format!(
            "show([], []), show([{pool}], [{guest}]), guests.rows[0].classList.add('new'), \
             document.getAnimations().filter(a => a.animationName === 'new').length"
        );
        assert_eq!(self.browser.value(&moving)?, 0);
        self.browser.view(1280, 800, false, false)?;
        assert_eq!(self.browser.value(&moving)?, 1);
        self.browser.value("reload()")?;
        let true_again = "guests.rows.length === 0 && pools.rows.length === 2";
        self.browser.wait("what there is", true_again)
    }

    /// Rows come and go by what others do: whoever is at one stays there, or gets to the next.
    fn keeps_the_focus(&mut self, daemon: &Daemon) -> Result<()> {
        let take = || -> Result<Value> {
            let (status, body) = daemon.request("POST", "/v1/pools/booted/take", "")?;
            assert_eq!(status, 200, "{body}");
            Ok(serde_json::from_str(&body)?)
        };
        let name = |guest: &Value| format!("Reset {}", guest["name"].as_str().unwrap_or_default());
        let first = take()?;
        self.browser.wait("a guest", "guests.rows.length === 1")?;
        self.browser.value("guests.querySelector('[data-does=reset]').focus()")?;
        let second = take()?;
        self.browser.wait("another guest", "guests.rows.length === 2")?;
        assert_eq!(self.focused()?, name(&first));
        for (guest, then) in [(&first, name(&second)), (&second, "Guests that are taken".into())] {
            let rows = self.browser.value("guests.rows.length")?;
            let path = format!("/v1/guests/{}", guest["id"].as_str().ok_or("no id")?);
            assert_eq!(daemon.request("DELETE", &path, "")?.0, 204);
            self.browser.wait("a guest less", &format!("guests.rows.length < {rows}"))?;
            assert_eq!(self.focused()?, then);
        }
        Ok(())
    }

    /// Uses the button whose name begins so.
    fn act(&mut self, name: &str, by_keyboard: bool) -> Result<()> {
        if by_keyboard {
            self.reach(name)?;
            return self.browser.press(Key::Enter);
        }
        let found = self.button(name)?;
        self.browser.click(&found)
    }

    /// Waits for the button whose name begins so; how a script finds it.
    fn button(&mut self, name: &str) -> Result<String> {
        let name = json!(name);
        let found = format!(
            "[...(sure.open ? sure : document).querySelectorAll('button')].find(button => \
             button.checkVisibility() && !button.ariaDisabled && button.textContent.startsWith({name}))"
        );
        self.browser.wait(&format!("the button {name}"), &format!("!!{found}"))?;
        Ok(found)
    }

    /// Puts the focus on it by the keyboard.
    fn reach(&mut self, name: &str) -> Result<()> {
        self.button(name)?;
        let name = json!(name);
        let here = format!("document.activeElement.textContent.startsWith({name})");
        for _ in 0..50 {
            if self.browser.value(&here)? == true {
                let shown = "document.activeElement.matches(':focus-visible') && \
                     getComputedStyle(document.activeElement).outlineStyle !== 'none'";
                assert_eq!(self.browser.value(shown)?, true, "the focus on {name} can't be seen");
                assert_eq!(self.browser.value(COVERED)?, false, "{name} is covered");
                return Ok(());
            }
            self.browser.press(Key::Tab)?;
        }
        Err(format!("{name} can't be reached by the keyboard").into())
    }

    fn focused(&mut self) -> Result<String> {
        let focused = self.browser.value("document.activeElement.textContent")?;
        Ok(focused.as_str().unwrap_or_default().to_owned())
    }

    fn picture(&mut self, name: &str) -> Result<()> {
        let Some(folder) = std::env::var_os("SNAPBACK_TEST_PICTURES") else { return Ok(()) };
        let folder = PathBuf::from(folder);
        std::fs::create_dir_all(&folder)?;
        self.browser.picture(&folder.join(format!("{name}.png")))
    }
}

/// What reaches beyond the window's sides.
const OVERFLOWS: &str = "(() => {
    const width = document.documentElement.clientWidth;
    // What is there for screen readers only takes no place.
    const unseen = element => element && (getComputedStyle(element).clipPath !== 'none' ||
        unseen(element.parentElement));
    const out = [...document.body.querySelectorAll('*')].filter(element => {
        const box = element.getBoundingClientRect();
        const beyond = box.right > width + .5 || box.left < -.5;
        return element.checkVisibility() && beyond && !unseen(element);
    });
    const all = out.map(element => element.outerHTML.slice(0, 120));
    for (const section of document.querySelectorAll('section')) {
        const inner = section.getBoundingClientRect().right - 10;
        const table = section.querySelector('table');
        if (table?.getBoundingClientRect().right > inner) all.push(`${table.innerText} leaves its frame`);
    }
    if (document.documentElement.scrollWidth > width) all.push('the page can be scrolled sideways');
    return all;
})()";

/// Whether something lies over the element that has the focus.
const COVERED: &str = "(() => {
    const focused = document.activeElement;
    const box = focused.getBoundingClientRect();
    return !focused.contains(document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2));
})()";

/// Text with less contrast to what is behind it than 4.5 (WCAG 2.2, 1.4.3).
const PALE: &str = "(() => {
    const parts = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = colour => {
        const [r, g, b] = parts(colour).map(part => part / 255)
            .map(part => part <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b;
    };
    const behind = element => {
        for (let at = element; at; at = at.parentElement) {
            const colour = getComputedStyle(at).backgroundColor;
            if ((parts(colour)[3] ?? 1) === 1) return colour;
        }
        return 'rgb(255, 255, 255)';
    };
    const pale = [];
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const element = texts.currentNode.parentElement;
        if (!texts.currentNode.data.trim() || !element.checkVisibility()) continue;
        const style = getComputedStyle(element);
        const front = element.closest('svg') ? style.fill : style.color;
        const both = [light(front), light(behind(element))];
        const contrast = (Math.max(...both) + .05) / (Math.min(...both) + .05);
        if (contrast < 4.5) pale.push(`${texts.currentNode.data}: ${contrast.toFixed(2)}`);
    }
    return pale;
})()";
