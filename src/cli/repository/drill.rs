//! `snapback drill`: whether a snapshot of a repository can be reverted here.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;

use super::events::RepositoryEvent;
use super::far::FarArgs;
use crate::cli::cancellation;
use crate::cli::failure::Failure;
use crate::cli::host::SiteArgs;
use crate::cli::output::{Output, size};
use crate::kind::ErrorKind;
use crate::revert::{RevertOptions, prove};

#[derive(Args)]
pub(in crate::cli) struct DrillArgs {
    /// The snapshot, such as web1@latest
    name: String,
    #[command(flatten)]
    far: FarArgs,
    /// The QEMU binary to use instead of the recorded one
    #[arg(long, value_name = "BIN")]
    qemu: Option<PathBuf>,
    #[command(flatten)]
    site: SiteArgs,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
pub(in crate::cli) async fn drill(args: DrillArgs) -> Result<(), Failure> {
    let output = Arc::new(Output::new(args.json));
    let began = Instant::now();
    let far = args.far.open_in_repository(&args.name, &output).await?;
    let mut options = RevertOptions::from_afar(far.clone());
    options.rewrite = args.site.apply(options.rewrite)?;
    options.rewrite.qemu = args.qemu;
    let name = args.name;
    let waiting = output.waiting("reverting it once");
    let ran = prove(&options, cancellation()?, |_| {}).await;
    drop(waiting);
    let ran = ran.map_err(|error| {
        let message = format!("{name} can't be reverted on this host: {error}");
        Failure::said(ErrorKind::NotProved, message)
    })?;
    let whole = began.elapsed();
    let event = RepositoryEvent::Drilled {
        snapshot: far.id().to_string(),
        machine: far.machine().to_owned(),
        ran_ms: ran.as_secs_f64() * 1e3,
        whole_ms: whole.as_secs_f64() * 1e3,
        fetched_bytes: far.fetched(),
    };
    let says = format!(
        "{name}: its guest ran after {:.1} s and was whole after {:.1} s, with {} fetched; it has been \
         thrown away",
        ran.as_secs_f64(),
        whole.as_secs_f64(),
        size(far.fetched())
    );
    output.repository(&event, "drilled", &says);
    Ok(())
}
