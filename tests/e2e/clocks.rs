//! What a reverted guest sees of time.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::harness::{Dir, Reverted, text};
use crate::shared::shared;
use crate::support::{Contact, Qemu, Result, SOON, wait_until};
use crate::tests_on_both;

tests_on_both! {
    the_guests_time_goes_on_and_the_machines_clock_as_asked
}

/// The least time between the moment and the reverts, in seconds: enough to be told from
/// the second that clocks may be off.
const MEANWHILE: f64 = 6.0;

/// How far a clock may be off: it shows full seconds, and drifts.
const OFF: f64 = 2.5;

/// The guest's own time and the machine's clock, in seconds since 1970.
pub fn clocks(guest: &mut Contact) -> Result<(f64, f64)> {
    let answer = guest.oracle.ask("time")?;
    let field = |name: &str| {
        let value = answer.split(' ').find_map(|word| word.strip_prefix(name));
        value.and_then(|value| value.parse::<f64>().ok()).ok_or(format!("no {name} in {answer}"))
    };
    Ok((field("wall_ms=")? / 1e3, field("rtc_s=")?))
}

/// The host's time, in seconds since 1970.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn the_guests_time_goes_on_and_the_machines_clock_as_asked(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    let ended = dir.snapback(&["info", text(&shared.image)]).succeed()?;
    let info: &Value = &ended.events[0];
    let moment = info["moment_unix_us"].as_f64().ok_or("no moment")? / 1e6;
    // The guest's time need not be the host's: how far they are apart stays as it is.
    let ahead = shared.ahead;
    wait_until(SOON, "some time to pass", || now() > moment + MEANWHILE)?;

    for rtc in ["now", "keep"] {
        let to = dir.make(rtc)?;
        let start = now();
        let revert = dir.revert(&shared.image, &shared.from, &to).with(&["--rtc", rtc]);
        let mut reverted = Reverted::of(revert, &to)?;
        let (guest, machine) = clocks(&mut reverted)?;
        reverted.resident()?;
        // As far as they may have come since it runs again.
        let latest = moment + (now() - start) + OFF;
        assert!(moment - OFF < guest - ahead && guest - ahead < latest, "{guest} {moment}");
        match rtc {
            "now" => assert!(start - OFF < machine && machine < now() + OFF, "{machine} {start}"),
            _ => assert!(moment - OFF < machine && machine < latest, "{machine} {moment}"),
        }
    }
    Ok(())
}
