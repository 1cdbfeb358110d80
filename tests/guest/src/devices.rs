//! What the kernel has found of the machine's devices, and whether they work.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// Reading a file that the kernel makes.
fn read(path: impl AsRef<Path>) -> io::Result<String> {
    Ok(fs::read_to_string(path)?.trim().to_owned())
}

/// The names in a directory, sorted; none where there is no such directory.
fn names(directory: &str) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// PCI devices as `address:vendor:device`, network cards, and disks.
pub fn list() -> io::Result<String> {
    let mut pci = Vec::new();
    for address in names("/sys/bus/pci/devices") {
        let id = |name: &str| read(format!("/sys/bus/pci/devices/{address}/{name}"));
        let (vendor, device) = (id("vendor")?, id("device")?);
        let short = |id: &str| id.trim_start_matches("0x").to_owned();
        pci.push(format!("{address}:{}:{}", short(&vendor), short(&device)));
    }
    let is_disk = |name: &String| name.starts_with("vd") || name.starts_with("sd");
    let disks: Vec<String> = names("/sys/class/block").into_iter().filter(is_disk).collect();
    Ok(format!(
        "pci={} net={} disks={} ports={}",
        pci.join(","),
        names("/sys/class/net").join(","),
        disks.join(","),
        names("/sys/class/virtio-ports").join(",")
    ))
}

/// Brings all vCPUs online; how many there are then.
pub fn online_cpus() -> io::Result<usize> {
    let directory = "/sys/devices/system/cpu";
    let is_cpu = |name: &str| name.strip_prefix("cpu").is_some_and(|n| n.parse::<u32>().is_ok());
    let mut count = 0;
    for cpu in names(directory).into_iter().filter(|name| is_cpu(name)) {
        let switch = format!("{directory}/{cpu}/online");
        // The first can't be switched off, and has no switch.
        if Path::new(&switch).exists() && read(&switch)? == "0" {
            fs::write(&switch, "1")?;
        }
        count += 1;
    }
    Ok(count)
}

/// Takes plugged memory into use, for the pages of programs; MiB of memory then.
pub fn online_memory() -> io::Result<u64> {
    let directory = "/sys/devices/system/memory";
    for block in names(directory).into_iter().filter(|name| name.starts_with("memory")) {
        let state = format!("{directory}/{block}/state");
        if read(&state)? == "offline" {
            fs::write(&state, "online_movable")?;
        }
    }
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.map(|kib| kib >> 10).ok_or_else(|| io::Error::other("/proc/meminfo tells no MemTotal"))
}

/// Random bytes of the machine's, in hexadecimal.
pub fn random() -> io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/hwrng")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Writes a line to the virtio-serial port of that name.
pub fn say(port: &str, line: &str) -> io::Result<()> {
    let directory = "/sys/class/virtio-ports";
    let is_it = |name: &String| read(format!("{directory}/{name}/name")).is_ok_and(|n| n == port);
    let Some(device) = names(directory).into_iter().find(is_it) else {
        return Err(io::Error::other("there is no such port"));
    };
    let mut port = OpenOptions::new().write(true).open(format!("/dev/{device}"))?;
    port.write_all(format!("{line}\n").as_bytes())
}

/// How often an address is asked for, a second each time.
const ATTEMPTS: usize = 15;

/// Asks by a network card who has the address that QEMU's user networks have (ARP, RFC 826);
/// whether the answer came.
pub fn arp(card: &str) -> io::Result<bool> {
    const US: [u8; 4] = [10, 0, 2, 15];
    const QEMU: [u8; 4] = [10, 0, 2, 2];
    let mac: Vec<u8> = read(format!("/sys/class/net/{card}/address"))?
        .split(':')
        .filter_map(|byte| u8::from_str_radix(byte, 16).ok())
        .collect();
    let protocol = (libc::ETH_P_ARP as u16).to_be();
    // SAFETY: takes numbers only.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(protocol)) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    switch_on(&socket, card)?;

    let name = CString::new(card)?;
    // SAFETY: all zeros is a valid address, and the name ends in NUL.
    let (mut address, index) =
        unsafe { (zeroed::<libc::sockaddr_ll>(), libc::if_nametoindex(name.as_ptr())) };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = index as i32;
    let second = libc::timeval { tv_sec: 1, tv_usec: 0 };
    // SAFETY: both structures live on, and their sizes are given.
    let done = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        ) | libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const second).cast(),
            size_of::<libc::timeval>() as u32,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }

    let head = [0, 1, 8, 0, 6, 4, 0, 1]; // Ethernet, IPv4, lengths, a request
    let question = [&[0xff; 6], &mac[..], &[8, 6], &head, &mac, &US, &[0; 6], &QEMU].concat();
    for _ in 0..ATTEMPTS {
        // SAFETY: the buffers live on, and their lengths are given.
        unsafe { libc::send(socket.as_raw_fd(), question.as_ptr().cast(), question.len(), 0) };
        let mut frame = [0_u8; 128];
        // SAFETY: as above.
        let got =
            unsafe { libc::recv(socket.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0) };
        if got >= 42 && frame[20..22] == [0, 2] && frame[28..32] == QEMU {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Switches a network card on.
fn switch_on(socket: &OwnedFd, card: &str) -> io::Result<()> {
    // SAFETY: all zeros is a valid request.
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(card.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the request lives on and holds a name that ends in NUL.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw mut request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A part of memory that is held on to: `mib` of words that follow from `seed`.
pub struct Held {
    words: Vec<u64>,
    seed: u64,
}

impl Held {
    pub fn new(mib: u64, seed: u64) -> Held {
        let words = mib << 20 >> 3;
        Held { words: (0..words).map(|n| crate::content::mix(n ^ seed << 32)).collect(), seed }
    }

    /// How many words are not what they were.
    pub fn wrong(&self) -> usize {
        let is_wrong = |(n, word): &(u64, &u64)| **word != crate::content::mix(n ^ self.seed << 32);
        (0..).zip(&self.words).filter(is_wrong).count()
    }
}
