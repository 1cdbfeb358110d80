//! Saves a running guest:
//!
//!     cargo run --example save -- QMP-SOCKET IMAGE
//!
//! The guest stands still for a few milliseconds, and runs on while its memory is
//! written.

use std::process::ExitCode;

use snapback::{Cancellation, SaveError, SaveEvent, SaveOptions, save};

#[tokio::main]
async fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let (Some(qmp), Some(image), None) = (args.next(), args.next(), args.next()) else {
        eprintln!("usage: save QMP-SOCKET IMAGE");
        return ExitCode::from(2);
    };
    let options = SaveOptions::new(qmp, image);
    match run(&options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: &SaveOptions) -> Result<(), SaveError> {
    let saved = save(options, cancel(), |event| match event {
        SaveEvent::Checked { qemu, ram_bytes, .. } => {
            println!("QEMU {qemu}, {} MiB of RAM: can be saved", ram_bytes >> 20);
        }
        SaveEvent::Moment { pause_ms: Some(ms), .. } => {
            println!("the guest stood still for {ms:.1} ms and runs on");
        }
        SaveEvent::Moment { pause_ms: None, .. } => println!("the guest was paused, and stays so"),
        SaveEvent::Progress { pages, total, .. } => println!("{pages} of {total} pages"),
        SaveEvent::Draining => println!("giving up, once QEMU has sent all memory"),
        SaveEvent::Ready { overlays } => println!("its disks go on in {}", overlays.join(", ")),
        SaveEvent::Saved { image_bytes, stalled_ms, .. } => {
            println!("{} MiB on disk; QEMU waited {stalled_ms:.0} ms for us", image_bytes >> 20);
        }
        _ => {}
    })
    .await?;
    println!("image {}", saved.identity);
    Ok(())
}

/// Ctrl-C as the library wants it. Whoever leaves it out lets Ctrl-C kill the program in
/// the middle, and the guest may wait for its memory to be taken for ever.
fn cancel() -> Cancellation {
    let cancel = Cancellation::new();
    let requested = cancel.clone();
    tokio::spawn(async move {
        while tokio::signal::ctrl_c().await.is_ok() {
            requested.request();
        }
    });
    cancel
}
