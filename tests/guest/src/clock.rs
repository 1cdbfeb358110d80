//! What the guest believes the time to be.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Linux's `RTC_RD_TIME` (rtc(4)): `_IOR('p', 9, struct rtc_time)`.
const RTC_RD_TIME: libc::Ioctl = 0x8024_7009;

/// Milliseconds of CLOCK_REALTIME since 1970.
pub fn wall_ms() -> u64 {
    std::time::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_millis() as u64)
}

/// Seconds since 1970 by the machine's battery-backed clock, which Linux keeps in UTC.
pub fn rtc_seconds() -> io::Result<i64> {
    /// As the kernel has it (linux/rtc.h).
    #[repr(C)]
    #[derive(Default)]
    struct RtcTime {
        sec: i32,
        min: i32,
        hour: i32,
        mday: i32,
        mon: i32,
        year: i32,
        wday: i32,
        yday: i32,
        isdst: i32,
    }
    let rtc = File::open("/dev/rtc0")?;
    let mut time = RtcTime::default();
    // SAFETY: the call writes one struct of that layout, which `time` is.
    if unsafe { libc::ioctl(rtc.as_raw_fd(), RTC_RD_TIME, &mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: plain integers and a null pointer, for which zero is a value.
    let mut broken_down: libc::tm = unsafe { std::mem::zeroed() };
    broken_down.tm_sec = time.sec;
    broken_down.tm_min = time.min;
    broken_down.tm_hour = time.hour;
    broken_down.tm_mday = time.mday;
    broken_down.tm_mon = time.mon;
    broken_down.tm_year = time.year;
    // SAFETY: reads and normalises one struct.
    Ok(unsafe { libc::timegm(&mut broken_down) })
}
