//! The argument about the machine's clock.

use clap::{Args, ValueEnum};

use crate::revert::Rtc;

/// What the guest finds on the machine's clock.
#[derive(Args)]
pub(super) struct RtcArgs {
    /// What the machine's battery-backed clock shows; the guest's own goes on from the moment
    #[arg(long, value_name = "TIME", default_value = "now")]
    rtc: RtcTime,
}

#[derive(Clone, Copy, ValueEnum)]
enum RtcTime {
    /// The time of now
    Now,
    /// The time of the snapshot's moment, from which it goes on
    Keep,
}

impl From<RtcArgs> for Rtc {
    fn from(args: RtcArgs) -> Rtc {
        match args.rtc {
            RtcTime::Now => Rtc::Now,
            RtcTime::Keep => Rtc::Keep,
        }
    }
}
