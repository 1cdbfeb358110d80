//! A guest from boot to end.

use std::fs::{self, File};
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use super::disk::{Disk, VIRTIO_BALLOON, VIRTIO_BLK};
use super::log::SerialLog;
use super::oracle::Oracle;
use super::process::{Pidfd, spawn_bound};
use super::qemu::{Arch, Qemu, artifact, deps};
use super::{Result, wait_for};

/// The files in a guest's folder.
const QMP: &str = "qmp.sock";
const CONSOLE: &str = "serial0.log";
const QUESTIONS: &str = "serial1.sock";
const JOURNAL: &str = "serial2.log";
const AGENT: &str = "serial3.sock";
const STDERR: &str = "qemu.stderr";

/// Allowed for a boot: a hundred times what it takes an idle machine.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);

/// The kernel of guests with processors of a PC. One that is not compressed boots a third sooner under
/// TCG; but QEMU writes all of it to memory whenever it starts or resets a machine (45 MiB), which no
/// measurement should have in it.
pub const KERNEL: &str = if cfg!(debug_assertions) { "vmlinux" } else { "vmlinuz" };

/// What the kernel is to leave out: under TCG on a busy host, timer interrupts come too late for its
/// check of them, which ends in a panic. The others take a quarter of the boot's time, and no test needs
/// them.
const LEFT_OUT: &str = "no_timer_check cryptomgr.notests ipv6.disable=1 rodata=off \
    initcall_blacklist=init_kprobe_trace,cubictcp_register,slab_sysfs_init,crypto_kdf108_init,load_system_certificate_list";

/// How much memory the guest fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// That many MiB.
    Mib(u64),
    /// That share of what the guest's kernel leaves.
    Percent(u64),
}

/// A guest to boot.
#[derive(Debug, Clone)]
pub struct GuestOptions {
    /// The QEMU to run it on.
    pub qemu: Qemu,
    /// Its processors. One that is no PC runs the guest of `tests/arm64`, which answers what
    /// it knows of the oracle's questions; what the oracle would do is ignored.
    pub arch: Arch,
    /// RAM in MiB; the guest needs about 100.
    pub mib: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// Machine type, such as `pc` or `q35`.
    pub machine: String,
    /// A memory backend to use for RAM, without `id` and `size`: for example
    /// `memory-backend-memfd,share=on`. None is QEMU's anonymous memory.
    pub memory_backend: Option<String>,
    /// What it fills.
    pub fill: Fill,
    /// Threads that rewrite pages.
    pub writers: u64,
    /// Pages which each of them rewrites a second; 0 for as many as it can.
    pub rate: u64,
    /// Only the first so many pages are rewritten; 0 for all.
    pub hot_pages: u64,
    /// Share of incompressible pages, in percent.
    pub random_percent: u64,
    /// Share of pages full of zeros, in percent; the rest is compressible.
    pub zero_percent: u64,
    /// Milliseconds between heartbeats; 0 for none.
    pub beat_ms: u64,
    /// Whether the guest loads the driver of virtio disks (`/dev/vda` and on).
    pub virtio_blk: bool,
    /// Whether it has a virtio balloon, and the driver of it.
    pub virtio_balloon: bool,
    /// More kernel modules to load, each behind those that it needs, separated by commas.
    pub modules: &'static str,
    /// Its disks; their files must be there.
    pub disks: Vec<Disk>,
    /// Whether the first disk holds a Debian guest (`tests/debian`), which runs in the
    /// oracle's place then; what the oracle would do is ignored.
    pub debian: bool,
    /// More arguments for QEMU, at the end.
    pub args: Vec<String>,
}

impl Default for GuestOptions {
    fn default() -> GuestOptions {
        GuestOptions {
            qemu: Qemu::V7,
            arch: Arch::X86_64,
            mib: 256,
            vcpus: 1,
            machine: "pc".into(),
            memory_backend: None,
            fill: Fill::Percent(75),
            writers: 1,
            rate: 1000,
            hot_pages: 0,
            random_percent: 50,
            zero_percent: 15,
            beat_ms: 20,
            virtio_blk: false,
            virtio_balloon: false,
            modules: "",
            disks: Vec::new(),
            debian: false,
            args: Vec::new(),
        }
    }
}

impl GuestOptions {
    /// The arm64 guest with two vCPUs; it boots in about 5 s.
    pub fn arm64(qemu: Qemu) -> GuestOptions {
        let (arch, machine) = (Arch::Aarch64, "virt".into());
        GuestOptions { qemu, arch, machine, vcpus: 2, ..GuestOptions::default() }
    }

    /// QEMU's arguments, for a guest whose files are in `dir`.
    pub fn qemu_args(&self, dir: &Path) -> Result<Vec<String>> {
        // A /dev/kvm that opens need not boot a guest: only a variable picks it, and never for
        // processors that the host doesn't have.
        let asked = std::env::var("SNAPBACK_TEST_ACCEL").ok();
        let accel = asked.filter(|_| self.arch == Arch::X86_64).unwrap_or_else(|| "tcg".into());
        let file = |name: &str| dir.join(name).display().to_string();
        let deps_file = |name| artifact(deps().join(name)).map(|path| path.display().to_string());
        let (kernel, initramfs) = match self.arch {
            Arch::X86_64 => (KERNEL, "initramfs.cpio"),
            Arch::Aarch64 => ("arm64/vmlinuz", "arm64/initramfs.cpio"),
        };
        let mut machine = self.machine.clone();
        let mut args: Vec<String> = Vec::new();
        if let Some(backend) = &self.memory_backend {
            let name = self.main_memory();
            let object = format!("{backend},id={name},size={}M", self.mib);
            args.extend(["-object".into(), object]);
            machine += &format!(",memory-backend={name}");
        }
        let fixed = ["-nodefaults", "-no-user-config", "-display", "none"].map(String::from);
        args.extend(fixed);
        let (mib, vcpus) = (self.mib.to_string(), self.vcpus.to_string());
        let console = format!("file,id=serial0,path={},append=on", file(CONSOLE));
        let questions = format!("socket,id=serial1,path={},server=on,wait=off", file(QUESTIONS));
        // The board `virt` has one serial port of its own.
        let second_port = match self.arch {
            Arch::X86_64 => ("-serial", "chardev:serial1".to_string()),
            Arch::Aarch64 => ("-device", "pci-serial,chardev=serial1".to_string()),
        };
        if self.arch == Arch::Aarch64 {
            args.extend(["-cpu", "cortex-a57"].map(String::from));
        }
        let pairs = [
            ("-machine", machine),
            ("-accel", accel),
            ("-m", mib),
            ("-smp", vcpus),
            ("-kernel", deps_file(kernel)?),
            ("-initrd", deps_file(initramfs)?),
            ("-append", self.kernel_command_line()),
            ("-chardev", console),
            ("-serial", "chardev:serial0".into()),
            ("-chardev", questions),
            second_port,
            ("-qmp", format!("unix:{},server=on,wait=off", file(QMP))),
        ];
        args.extend(pairs.into_iter().flat_map(|(name, value)| [name.to_string(), value]));
        args.extend(self.disks.iter().flat_map(Disk::args));
        if self.virtio_balloon {
            args.extend(["-device", "virtio-balloon-pci"].map(String::from));
        }
        if self.debian {
            let pairs = [
                ("-chardev", format!("file,id=serial2,path={},append=on", file(JOURNAL))),
                ("-serial", "chardev:serial2".into()),
                ("-chardev", format!("socket,id=serial3,path={},server=on,wait=off", file(AGENT))),
                ("-serial", "chardev:serial3".into()),
            ];
            args.extend(pairs.into_iter().flat_map(|(name, value)| [name.to_string(), value]));
        }
        args.extend(self.args.iter().cloned());
        Ok(args)
    }

    /// QEMU's name of the block that is main memory where no backend gives it.
    pub fn main_memory(&self) -> &'static str {
        match self.arch {
            Arch::X86_64 => "pc.ram",
            Arch::Aarch64 => "mach-virt.ram",
        }
    }

    /// The command line of the guest's kernel, which tells the oracle what to do.
    pub fn kernel_command_line(&self) -> String {
        if self.arch == Arch::Aarch64 {
            return "console=ttyAMA0 quiet".into();
        }
        let fill = match self.fill {
            Fill::Mib(mib) => format!("oracle.fill_mib={mib}"),
            Fill::Percent(percent) => format!("oracle.fill_percent={percent}"),
        };
        let modules = self.modules();
        if self.debian {
            return format!(
                "console=ttyS0 quiet {LEFT_OUT} oracle.modules={modules} oracle.root=/dev/vda"
            );
        }
        format!(
            "console=ttyS0 quiet {LEFT_OUT} {fill} oracle.writers={} oracle.rate={} oracle.hot_pages={} \
             oracle.random_percent={} oracle.zero_percent={} oracle.beat_ms={} \
             oracle.modules={modules}",
            self.writers,
            self.rate,
            self.hot_pages,
            self.random_percent,
            self.zero_percent,
            self.beat_ms,
        )
    }

    /// The kernel modules that are asked for and that its devices take, each once.
    fn modules(&self) -> String {
        let drivers = [(self.virtio_blk, VIRTIO_BLK), (self.virtio_balloon, VIRTIO_BALLOON)];
        let wanted = drivers.into_iter().filter(|(wanted, _)| *wanted).map(|(_, driver)| driver);
        let mut modules: Vec<&str> = Vec::new();
        let disks = self.disks.iter().map(Disk::modules);
        for list in wanted.chain(disks).chain([self.modules]) {
            for module in list.split(',').filter(|name| !name.is_empty()) {
                if !modules.contains(&module) {
                    modules.push(module);
                }
            }
        }
        modules.join(",")
    }
}

/// Ways to reach a running guest, whoever started it.
pub struct Contact {
    /// QEMU's process.
    pub pid: u32,
    /// The folder with the guest's sockets and logs; a revert that maps this folder
    /// to another keeps out of the original's way.
    pub dir: PathBuf,
    /// QEMU's control socket.
    pub qmp_path: PathBuf,
    /// The guest's answers.
    pub oracle: Oracle,
    /// The guest's console.
    pub log: SerialLog,
}

impl Contact {
    fn make(pid: u32, dir: &Path, log: SerialLog) -> Result<Contact> {
        let oracle = Oracle::connect(&dir.join(QUESTIONS))?;
        Ok(Contact { pid, dir: dir.into(), qmp_path: dir.join(QMP), oracle, log })
    }
}

/// A guest that this process booted. Dropping it kills its QEMU and removes its
/// folder; should this process be killed, the kernel kills QEMU.
pub struct Guest {
    // Fields are dropped in this order: first QEMU, then its folder.
    contact: Contact,
    process: Process,
    folder: TempDir,
}

impl Guest {
    /// Boots a guest and waits until its memory is filled and its writers run.
    ///
    /// # Errors
    /// When QEMU ends, the guest panics or isn't ready within five minutes; with
    /// the end of its console's log. When set-up has not been run.
    pub fn boot(options: &GuestOptions) -> Result<Guest> {
        // TempDir makes it 0700: whoever reaches these sockets owns the guest.
        let folder = tempfile::Builder::new().prefix("snapback-guest-").tempdir()?;
        let dir = folder.path();
        let mut command = options.qemu.command_for(options.arch)?;
        command.args(options.qemu_args(dir)?).current_dir(dir);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(dir.join(STDERR))?);
        let mut process = Process(spawn_bound(command)?);

        let log = SerialLog::whole(&dir.join(CONSOLE));
        wait_for(BOOT_TIMEOUT, "the guest to be ready", || ready(&mut process.0, &log, dir))
            .map_err(|e| format!("{e}; its console ends:\n{}", log.tail()))?;
        let contact = Contact::make(process.0.id(), dir, log)?;
        Ok(Guest { contact, process, folder })
    }

    /// Kills QEMU now, and keeps the folder: what a revert in the same place needs.
    pub fn kill(mut self) -> TempDir {
        self.process.end();
        self.folder
    }
}

/// Whether the guest has booted.
fn ready(qemu: &mut Child, log: &SerialLog, dir: &Path) -> Result<Option<()>> {
    // Whole lines only: what comes is a report, and wants to be read to its end.
    for line in log.text().split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        if line.contains("ORACLE READY") || line.contains("DEBIAN READY") {
            return Ok(Some(()));
        }
        if ["ORACLE PANIC", "DEBIAN PANIC", "Kernel panic"].iter().any(|cry| line.contains(cry)) {
            return Err("the guest panicked".into());
        }
    }
    if let Some(status) = qemu.try_wait()? {
        let said = fs::read_to_string(dir.join(STDERR)).unwrap_or_default();
        return Err(format!("QEMU ended with {status}: {said}").into());
    }
    Ok(None)
}

/// A child that ends with its owner.
struct Process(Child);

impl Process {
    fn end(&mut self) {
        // Killing fails only when it has ended; waiting then takes its exit code.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// A guest that somebody else started, such as a revert. Dropping it kills its
/// QEMU; the folder belongs to whoever made it.
pub struct Attached {
    contact: Contact,
    process: Pidfd,
}

impl Attached {
    /// Takes over the guest of QEMU process `pid`, whose files are in `dir`. Its log
    /// begins now.
    ///
    /// # Errors
    /// When there is no such process, or the guest's socket is not there.
    pub fn to(pid: u32, dir: &Path) -> Result<Attached> {
        let process = Pidfd::open(pid)?;
        let log = SerialLog::from_now(&dir.join(CONSOLE));
        match Contact::make(pid, dir, log) {
            Ok(contact) => Ok(Attached { contact, process }),
            Err(e) => {
                process.kill()?;
                Err(e)
            }
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if let Err(e) = self.process.kill() {
            eprintln!("a guest may be left behind: {e}");
        }
    }
}

impl Deref for Guest {
    type Target = Contact;
    fn deref(&self) -> &Contact {
        &self.contact
    }
}

impl DerefMut for Guest {
    fn deref_mut(&mut self) -> &mut Contact {
        &mut self.contact
    }
}

impl Deref for Attached {
    type Target = Contact;
    fn deref(&self) -> &Contact {
        &self.contact
    }
}

impl DerefMut for Attached {
    fn deref_mut(&mut self) -> &mut Contact {
        &mut self.contact
    }
}
