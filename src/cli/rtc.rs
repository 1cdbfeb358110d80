//! The argument about the machine's clock.

use clap::{Args, ValueEnum};

use crate::revert::Rtc;

/// The time that the machine's clock shows after a revert.
#[derive(Args, Clone)]
pub(super) struct RtcArgs {
    /// What the machine's battery-backed clock (RTC) shows; the guest's own clock always goes on
    /// from the moment of the snapshot
    #[arg(long, value_name = "TIME", default_value = "now")]
    rtc: RtcTime,
}

#[derive(Clone, Copy, ValueEnum)]
enum RtcTime {
    /// The present time
    Now,
    /// The time of the snapshot, from which it goes on
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
