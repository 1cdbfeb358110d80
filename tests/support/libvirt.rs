//! A libvirt of the tests' own: virtlogd and libvirtd as Debian ships them, in namespaces in which
//! their directories are folders of ours, so that a libvirt of the machine and ours don't meet.
//! Needs root.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tempfile::TempDir;

use super::{
    Attached, Format, GuestOptions, KERNEL, Pidfd, Qemu, Result, SOON, SerialLog, artifact, debian,
    deps, run, spawn_bound, wait_for,
};

/// The directories of libvirt's that are compiled in, and our folders for them.
const DIRECTORIES: [(&str, &str); 5] = [
    ("/etc/libvirt", "etc"),
    ("/var/lib/libvirt", "lib"),
    ("/run/libvirt", "run"),
    ("/var/log/libvirt", "log"),
    ("/var/cache/libvirt", "cache"),
];

/// `qemu.conf`: QEMU 7.2 as another user may call userfaultfd(2) only where the sysctl
/// `vm.unprivileged_userfaultfd` is 1, which is the whole machine's.
const AS_ROOT: &str =
    "user = \"root\"\ngroup = \"root\"\nclear_emulator_capabilities = 0\nremember_owner = 0\n";

/// The same for later QEMUs: as distributions ship it, but that guests see the device by which
/// these have userfaultfd.
const WITH_DEVICE: &str = r#"remember_owner = 0
cgroup_device_acl = ["/dev/null", "/dev/full", "/dev/zero", "/dev/random", "/dev/urandom", "/dev/ptmx", "/dev/kvm", "/dev/userfaultfd"]
"#;

/// The kernel modules of a guest with [two disks](DomainOptions::with_two_disks) that heeds its power
/// button.
const MODULES: &str = "virtio,virtio_ring,virtio_pci_legacy_dev,virtio_pci_modern_dev,virtio_pci,\
                       scsi_common,scsi_mod,sd_mod,virtio_scsi,button,evdev";

/// What of a newer libvirt has to be in the place of the system's.
const PARTS: [&str; 8] = [
    "/usr/sbin/libvirtd",
    "/usr/sbin/virtlogd",
    "/usr/lib/x86_64-linux-gnu/libvirt.so.0",
    "/usr/lib/x86_64-linux-gnu/libvirt-lxc.so.0",
    "/usr/lib/x86_64-linux-gnu/libvirt-qemu.so.0",
    "/usr/lib/x86_64-linux-gnu/libvirt",
    "/usr/lib/libvirt",
    "/usr/share/libvirt",
];

/// By what libvirt tells hosts apart.
#[derive(Clone, Copy)]
struct Host {
    name: &'static str,
    uuid: &'static str,
}

const ELSEWHERE: Host = Host { name: "elsewhere", uuid: "5eba11ed-0000-4000-8000-000000000002" };

/// Allowed for a boot.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);

/// A libvirt that runs. Dropping it ends its guests, then its daemons.
pub struct Libvirt {
    folder: TempDir,
    qemu: Qemu,
    host: Place,
    libvirtd: Mutex<Option<Daemon>>,
}

/// Where its daemon runs, and as whom.
enum Place {
    /// `qemu:///system`: as root, in these namespaces, which a process keeps.
    System { namespaces: Daemon, virtlogd: Mutex<Daemon> },
    /// `qemu:///session`: as this user, whose directories the environment names.
    Session { user: u32 },
}

/// A process that is killed when it is dropped.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

static SHARED: OnceLock<std::result::Result<&'static Libvirt, String>> = OnceLock::new();

/// The libvirt that all tests of this program share, until it ends.
///
/// # Errors
/// When it can't be started.
pub fn shared_libvirt() -> Result<&'static Libvirt> {
    extern "C" fn end() {
        if let Some(Ok(libvirt)) = SHARED.get() {
            libvirt.end();
            let _ = fs::remove_dir_all(libvirt.folder.path());
        }
    }
    let start = || {
        let libvirt: &Libvirt = Box::leak(Box::new(Libvirt::start().map_err(|e| e.to_string())?));
        // SAFETY: the function lives as long as the program, and does not unwind.
        assert_eq!(unsafe { libc::atexit(end) }, 0);
        Ok(libvirt)
    };
    SHARED.get_or_init(start).clone().map_err(Into::into)
}

impl Libvirt {
    /// Starts one: the system's, or a newer one if the environment has `SNAPBACK_TEST_LIBVIRT_NEWER`.
    ///
    /// # Errors
    /// When it isn't installed, or this isn't root.
    pub fn start() -> Result<Libvirt> {
        Libvirt::start_as(None, Libvirt::usual_qemu(), "")
    }

    /// The QEMU of the libvirt that tests have unless they say which.
    pub fn usual_qemu() -> Qemu {
        match std::env::var_os("SNAPBACK_TEST_LIBVIRT_NEWER") {
            Some(_) => Qemu::V10,
            None => Qemu::V7,
        }
    }

    /// Starts a newer one, of Debian 13, with QEMU 10. Its guests run as the user `libvirt-qemu`,
    /// and it saves them in its newest format.
    ///
    /// # Errors
    /// As [`Libvirt::start`].
    pub fn start_newer() -> Result<Libvirt> {
        Libvirt::start_as(None, Qemu::V10, "save_image_format = \"sparse\"\n")
    }

    /// Starts one that takes itself for that of another host: guests can migrate there.
    ///
    /// # Errors
    /// As [`Libvirt::start`].
    pub fn start_elsewhere() -> Result<Libvirt> {
        Libvirt::start_as(Some(ELSEWHERE), Libvirt::usual_qemu(), "")
    }

    /// `more` are settings of its QEMU driver.
    fn start_as(host: Option<Host>, qemu: Qemu, more: &str) -> Result<Libvirt> {
        let folder = tempfile::Builder::new().prefix("snapback-libvirt-").tempdir()?;
        // Its guests run as another user.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        let mut script = String::from("set -e\n");
        for (directory, ours) in DIRECTORIES {
            let ours = folder.path().join(ours);
            fs::create_dir(&ours)?;
            script += &format!("mkdir -p {directory}\nmount --bind {} {directory}\n", text(&ours));
        }
        if let Some(Ok(shared)) = SHARED.get()
            && shared.qemu == qemu
        {
            shared.copy_capabilities(&folder.path().join("cache"))?;
        }
        let is_newer = qemu == Qemu::V10;
        let own = PARTS.map(|place| (deps().join(format!("libvirt-11.3{place}")), place));
        let own = own.into_iter().filter(|_| is_newer);
        for (part, place) in qemu.parts().into_iter().chain(own) {
            script += &format!("mount --bind {} {place}\n", text(&artifact(part)?));
        }
        if is_newer {
            // The user's there, and not on the whole machine. KVM no guest has; but where libvirtd
            // has it and the user hasn't, libvirt asks QEMU for its abilities at every command.
            for name in ["userfaultfd", "kvm"] {
                let device = folder.path().join(name);
                let device = text(&device);
                script += &format!(
                    "if [ -e /dev/{name} ]; then\ncp -a /dev/{name} {device}\n\
                     chown libvirt-qemu {device}\nmount --bind {device} /dev/{name}\nfi\n"
                );
            }
        }
        let mut libvirtd = String::new();
        if let Some(Host { name, uuid }) = host {
            script += &format!("hostname {name}\n");
            libvirtd = format!("host_uuid = \"{uuid}\"\n");
        }
        let driver = if is_newer { WITH_DEVICE } else { AS_ROOT }.to_owned() + more;
        for (file, settings) in [
            ("libvirtd.conf", &libvirtd),
            ("virtlogd.conf", &String::new()),
            ("qemu.conf", &driver),
        ] {
            fs::write(folder.path().join("etc").join(file), settings)?;
        }
        let ready = folder.path().join("ready");
        script += &format!("touch {}\nexec sleep infinity\n", text(&ready));
        let mut command = Command::new("unshare");
        command.args(["--mount", "--uts", "--propagation", "private", "sh", "-c", &script]);
        let namespaces = Daemon(start(command, &folder.path().join("namespace.log"))?);
        wait_for(SOON, "a mount namespace (as root)", || Ok(ready.exists().then_some(())))?;
        let mut command = within(&namespaces.0, "virtlogd");
        command.args(["--pid-file", "/run/libvirt/virtlogd.pid"]);
        let virtlogd = Daemon(start(command, &folder.path().join("virtlogd.log"))?);
        Libvirt::started(folder, qemu, Place::System { namespaces, virtlogd: Mutex::new(virtlogd) })
    }

    /// Starts one of this user's own.
    ///
    /// # Errors
    /// As [`Libvirt::start`].
    pub fn start_session(user: u32) -> Result<Libvirt> {
        let folder = tempfile::Builder::new().prefix("snapback-libvirt-").tempdir()?;
        for (_, ours) in DIRECTORIES {
            fs::create_dir(folder.path().join(ours))?;
        }
        let settings = folder.path().join("etc/libvirt");
        fs::create_dir(&settings)?;
        // It would start a virtlogd that nobody ends.
        fs::write(settings.join("qemu.conf"), "stdio_handler = \"file\"\n")?;
        give(folder.path(), user)?;
        Libvirt::started(folder, Qemu::V7, Place::Session { user })
    }

    fn started(folder: TempDir, qemu: Qemu, host: Place) -> Result<Libvirt> {
        let libvirt = Libvirt { folder, qemu, host, libvirtd: Mutex::new(None) };
        libvirt.start_libvirtd()?;
        Ok(libvirt)
    }

    /// Copies what it knows of QEMU, which takes seconds to find out, to another one's cache.
    fn copy_capabilities(&self, cache: &Path) -> Result<()> {
        let known = self.path("cache/qemu/capabilities");
        let to = cache.join("qemu/capabilities");
        fs::create_dir_all(&to)?;
        for entry in fs::read_dir(known).into_iter().flatten() {
            let path = entry?.path();
            fs::copy(&path, to.join(path.file_name().unwrap_or_default()))?;
        }
        Ok(())
    }

    /// The environment of a session's user: where its libvirt is.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        const NAMES: [(&str, &str); 5] = [
            ("HOME", "lib"),
            ("XDG_RUNTIME_DIR", "run"),
            ("XDG_CONFIG_HOME", "etc"),
            ("XDG_CACHE_HOME", "cache"),
            ("XDG_DATA_HOME", "lib"),
        ];
        NAMES.map(|(name, folder)| (name, text(&self.path(folder)).to_owned())).to_vec()
    }

    /// Starts libvirtd, after [`Libvirt::stop_libvirtd`]; its guests have run on.
    ///
    /// # Errors
    /// When it doesn't answer.
    pub fn start_libvirtd(&self) -> Result<()> {
        let command = match &self.host {
            Place::System { namespaces, .. } => {
                let mut command = within(&namespaces.0, "libvirtd");
                command.args(["--pid-file", "/run/libvirt/libvirtd.pid"]);
                command
            }
            Place::Session { user } => {
                let mut command = Command::new("libvirtd");
                command.uid(*user).gid(*user).envs(self.environment()).current_dir("/");
                command
            }
        };
        let daemon = Daemon(start(command, &self.path("libvirtd.log"))?);
        *self.libvirtd() = Some(daemon);
        wait_for(SOON, "libvirtd to answer", || Ok(self.virsh(&["list"]).ok().map(drop)))
    }

    /// Kills libvirtd: all its connections break. Its guests run on.
    pub fn stop_libvirtd(&self) {
        *self.libvirtd() = None;
    }

    fn libvirtd(&self) -> std::sync::MutexGuard<'_, Option<Daemon>> {
        self.libvirtd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its connection URI.
    pub fn uri(&self) -> String {
        let (kind, socket) = match self.host {
            Place::System { .. } => ("system", "run/libvirt-sock"),
            Place::Session { .. } => ("session", "run/libvirt/libvirt-sock"),
        };
        format!("qemu+unix:///{kind}?socket={}", text(&self.path(socket)))
    }

    /// A file or folder in the folder of its guests' files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What `virsh` prints.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub fn virsh(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new("virsh");
        command.args(["--quiet", "--connect", &self.uri()]).args(args).stdin(Stdio::null());
        let done = command.output()?;
        if !done.status.success() {
            let said = String::from_utf8_lossy(&done.stderr);
            return Err(format!("virsh {}: {said}", args.join(" ")).into());
        }
        Ok(String::from_utf8(done.stdout)?)
    }

    /// `virsh console` of a domain, at a terminal: what it prints goes to a file.
    ///
    /// # Errors
    /// When `script` isn't installed.
    pub fn console(&self, domain: &str, printed: &Path) -> Result<Console> {
        let virsh = format!("virsh --connect '{}' console {domain}", self.uri());
        let mut command = Command::new("script");
        command.args(["--quiet", "--flush", "--command", &virsh, "/dev/null"]);
        // Open, or the terminal would end.
        command.stdin(Stdio::piped()).stdout(fs::File::create(printed)?);
        Ok(Console { child: spawn_bound(command)?, printed: SerialLog::whole(printed) })
    }

    /// The process of a domain's QEMU.
    ///
    /// # Errors
    /// When it doesn't run.
    pub fn pid_of(&self, domain: &str) -> Result<u32> {
        let file = self.state().join(format!("{domain}.pid"));
        Ok(fs::read_to_string(file)?.trim().parse()?)
    }

    /// Defines a domain, starts it, and waits until its guest is ready.
    ///
    /// # Errors
    /// When it can't be started, or isn't ready in time.
    pub fn boot(&self, options: &DomainOptions) -> Result<Attached> {
        let folder = self.path(options.name);
        fs::create_dir(&folder)?;
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755))?;
        for name in [KERNEL, "initramfs.cpio"] {
            // libvirt gives what it opens to its guests' user, so these are copies.
            fs::copy(artifact(deps().join(name))?, folder.join(name))?;
        }
        for disk in &options.disks {
            match options.guest.debian {
                true => debian::make_disk(&disk.file(&folder)).map(drop)?,
                false => disk.make(&folder)?,
            }
        }
        if let Place::Session { user } = self.host {
            give(&folder, user)?;
        }
        let xml = folder.join("domain.xml");
        fs::write(&xml, options.xml(&folder, self.qemu))?;
        self.virsh(&["define", text(&xml)])?;
        self.virsh(&["start", options.name])?;
        let pid = self.pid_of(options.name)?;
        let log = SerialLog::whole(&folder.join("serial0.log"));
        wait_for(BOOT_TIMEOUT, "libvirt's guest to be ready", || {
            let ready =
                |said: &str| ["ORACLE READY", "DEBIAN READY"].iter().any(|r| said.contains(r));
            Ok(ready(&log.text()).then_some(()))
        })
        .map_err(|e| format!("{e}; its console ends:\n{}", log.tail()))?;
        let mut guest = Attached::to(pid, &folder)?;
        guest.log = log;
        Ok(guest)
    }

    /// Where it keeps what it knows of its guests.
    fn state(&self) -> PathBuf {
        self.path(match self.host {
            Place::System { .. } => "run/qemu",
            Place::Session { .. } => "run/libvirt/qemu/run",
        })
    }

    /// Ends its guests and its daemons.
    fn end(&self) {
        self.stop_libvirtd();
        let names = fs::read_dir(self.state()).into_iter().flatten().flatten();
        for entry in names {
            let path = entry.path();
            let Some(domain) = path.file_name().and_then(|name| name.to_str()) else { continue };
            let Some(domain) = domain.strip_suffix(".pid").filter(|name| *name != "driver") else {
                continue;
            };
            // A file of a QEMU that has ended may be left.
            let Ok(process) = self.pid_of(domain).and_then(Pidfd::open) else { continue };
            let line = self
                .pid_of(domain)
                .and_then(|pid| Ok(fs::read_to_string(format!("/proc/{pid}/cmdline"))?));
            if line.is_ok_and(|line| line.contains(&format!("guest={domain}"))) {
                let _ = process.kill();
            }
        }
        let Place::System { namespaces, virtlogd, .. } = &self.host else { return };
        let mut virtlogd = virtlogd.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = virtlogd.0.kill();
        let _ = virtlogd.0.wait();
        // SAFETY: kill(2) takes numbers only; the process is a child that was not waited for.
        unsafe { libc::kill(namespaces.0.id() as i32, libc::SIGKILL) };
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        self.end();
    }
}

/// A terminal in which `virsh console` runs. Dropping it ends that.
pub struct Console {
    child: Child,
    /// What it has printed.
    pub printed: SerialLog,
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program in namespaces of ours.
fn within(namespaces: &Child, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.args(["--mount", "--uts", "--target", &namespaces.id().to_string(), program]);
    command
}

/// Makes a folder and all that is in it a user's.
fn give(path: &Path, user: u32) -> Result<()> {
    std::os::unix::fs::lchown(path, Some(user), Some(user))?;
    if path.is_dir() {
        fs::read_dir(path)?.try_for_each(|entry| give(&entry?.path(), user))?;
    }
    Ok(())
}

fn start(mut command: Command, log: &Path) -> Result<Child> {
    let log = fs::File::options().create(true).append(true).open(log)?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    spawn_bound(command)
}

/// A domain to boot.
pub struct DomainOptions {
    /// Its name, and that of its folder.
    pub name: &'static str,
    /// The oracle. The QEMU that it runs on is libvirt's.
    pub guest: GuestOptions,
    pub disks: Vec<DomainDisk>,
    /// More devices, in XML.
    pub devices: String,
    /// Whether its console is a terminal of its host's, with a log, and not a file.
    pub has_terminal: bool,
}

impl DomainOptions {
    fn xml(&self, folder: &Path, qemu: Qemu) -> String {
        let file = |name: &str| text(&folder.join(name)).to_owned();
        let GuestOptions { mib, vcpus, .. } = &self.guest;
        let disks: String = self.disks.iter().map(|disk| disk.xml(folder)).collect();
        let emulator = qemu.binary();
        let log = file("serial0.log");
        let (kind, element, attribute) = match self.has_terminal {
            true => ("pty", "log", "file"),
            false => ("file", "source", "path"),
        };
        let console = format!("<{element} {attribute}='{log}' append='on'/><target port='0'/>");
        format!(
            "<domain type='qemu'><name>{}</name><memory unit='MiB'>{mib}</memory>
             <vcpu>{vcpus}</vcpu>
             <os><type arch='x86_64' machine='pc'>hvm</type>
               <kernel>{}</kernel><initrd>{}</initrd><cmdline>{}</cmdline></os>
             <features><acpi/></features>
             <devices><emulator>{}</emulator>{disks}
               <serial type='{kind}'>{console}</serial>
               <serial type='unix'><source mode='bind' path='{}'/><target port='1'/></serial>
               <controller type='usb' model='none'/><memballoon model='none'/>{}
             </devices></domain>",
            self.name,
            file(KERNEL),
            file("initramfs.cpio"),
            self.guest.kernel_command_line(),
            text(&emulator),
            file("serial1.sock"),
            self.devices,
        )
    }
}

impl DomainOptions {
    /// The same with two disks: `vda`, a raw one on virtio, and `sda`, a qcow2 one on SCSI.
    pub fn with_two_disks(mut self) -> DomainOptions {
        let disk = |target, bus, format| DomainDisk { target, bus, format, mib: 16 };
        self.disks.push(disk("vda", "virtio", Format::Raw));
        self.disks.push(disk("sda", "scsi", Format::Qcow2));
        self.guest.virtio_blk = true;
        self.guest.modules = MODULES;
        self
    }
}

/// A domain whose guest is Debian, on its disk `vda`, with a channel for its agent.
pub fn debian_options(name: &'static str) -> DomainOptions {
    let mut options = domain_options(name);
    options.guest.mib = 512;
    options.guest.debian = true;
    options.guest.virtio_blk = true;
    options.guest.modules = "virtio_console";
    options.disks.push(DomainDisk { target: "vda", bus: "virtio", format: Format::Qcow2, mib: 0 });
    options.devices = "<channel type='unix'>
         <target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
        .to_owned();
    options
}

/// A disk of a domain.
pub struct DomainDisk {
    /// Its name for libvirt, such as `vda`, which is that of its file too.
    pub target: &'static str,
    /// libvirt's name of its bus: `virtio`, `scsi`.
    pub bus: &'static str,
    pub format: Format,
    pub mib: u64,
}

impl DomainDisk {
    fn file(&self, folder: &Path) -> PathBuf {
        folder.join(format!("{}.{}", self.target, self.format.name()))
    }

    fn make(&self, folder: &Path) -> Result<()> {
        let (file, size) = (self.file(folder), format!("{}M", self.mib));
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", self.format.name(), text(&file), &size]);
        run(&mut command).map(drop)
    }

    fn xml(&self, folder: &Path) -> String {
        let controller = match self.bus {
            "scsi" => "<controller type='scsi' model='virtio-scsi'/>",
            _ => "",
        };
        format!(
            "{controller}<disk type='file' device='disk'><driver name='qemu' type='{}'/>
             <source file='{}'/><target dev='{}' bus='{}'/></disk>",
            self.format.name(),
            text(&self.file(folder)),
            self.target,
            self.bus,
        )
    }
}

/// A path of these tests, all of which are UTF-8.
fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A domain as tests like it: small, writing, and 48 MiB of it incompressible. It has no disks.
pub fn domain_options(name: &'static str) -> DomainOptions {
    let guest = GuestOptions {
        mib: 160,
        fill: super::Fill::Mib(64),
        random_percent: 75,
        writers: 2,
        ..GuestOptions::default()
    };
    DomainOptions { name, guest, disks: Vec::new(), devices: String::new(), has_terminal: false }
}
