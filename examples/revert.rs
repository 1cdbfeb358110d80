//! Brings a saved guest back:
//!
//!     cargo run --example revert -- IMAGE
//!
//! The guest runs long before its memory is complete. This returns when it is; QEMU
//! then lives on by itself.

use std::process::ExitCode;

use snapback::{Cancellation, RevertError, RevertEvent, RevertOptions, revert};

#[tokio::main]
async fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let (Some(image), None) = (args.next(), args.next()) else {
        eprintln!("usage: revert IMAGE");
        return ExitCode::from(2);
    };
    let options = RevertOptions::new(image);
    match run(&options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: &RevertOptions) -> Result<(), RevertError> {
    let reverted = revert(options, cancel(), |event| match event {
        RevertEvent::Note { what, why } => println!("note: {what}: {why}"),
        RevertEvent::Disk { disk, overlay: Some(overlay), .. } => {
            println!("what the guest writes to its disk {disk} goes to {}", overlay.display());
        }
        RevertEvent::Disk { disk, .. } => {
            println!("what the guest writes to its disk {disk} goes with QEMU");
        }
        RevertEvent::QemuReady { pid } => println!("QEMU is up, process {pid}"),
        RevertEvent::Placing { reason, .. } => println!("{reason}"),
        RevertEvent::Running { .. } => println!("the guest runs; its memory follows"),
        RevertEvent::Progress(progress) => {
            println!("{} of {} pages", progress.pages, progress.total);
        }
        RevertEvent::StillNeeded => println!("the guest still needs us"),
        RevertEvent::Resident { progress, .. } => {
            println!("all memory is there; the guest asked for {} of it", progress.requests);
        }
        _ => {}
    })
    .await?;
    println!("QEMU lives on as process {}", reverted.pid);
    Ok(())
}

/// Ctrl-C as the library wants it. Whoever leaves it out lets Ctrl-C kill the program in
/// the middle, and the guest waits for ever for what it has not got.
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
