//! Guests that libvirt runs and saves (`virsh save`): they revert as images.
//!
//! libvirt's QEMU driver runs inside `virsh` here (`qemu:///embed`), with its files in a
//! folder of the test's: no daemon, no system settings. As root it wants a user that
//! only Debian's whole libvirt installs, so it is given up to be nobody.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::harness::{Dir, text};
use crate::shared::{MIB, options};
use crate::support::{Oracle, Qemu, Result, SOON, artifact, deps, spawn_bound, wait_for};
use crate::tests;

tests! {
    a_guest_that_libvirt_saved_reverts
}

/// User and group `nobody` on Debian.
const NOBODY: u32 = 65534;

/// Room for a guest of libvirt's.
struct Libvirt {
    folder: TempDir,
}

impl Libvirt {
    fn new() -> Result<Libvirt> {
        let libvirt =
            Libvirt { folder: tempfile::Builder::new().prefix("snapback-virt-").tempdir()? };
        for name in ["root/etc", "guest", "bin"] {
            fs::create_dir_all(libvirt.path(name))?;
        }
        // Without it, virsh leaves a virtlogd running.
        fs::write(libvirt.path("root/etc/qemu.conf"), "stdio_handler = \"file\"\n")?;
        for name in ["vmlinuz", "initramfs.cpio"] {
            fs::copy(artifact(deps().join(name))?, libvirt.path(name))?;
        }
        fs::write(libvirt.path("oracle.xml"), libvirt.xml()?)?;
        if fs::metadata(libvirt.folder.path())?.uid() == 0 {
            for name in
                [".", "root", "root/etc", "guest", "vmlinuz", "initramfs.cpio", "oracle.xml"]
            {
                chown(libvirt.path(name), Some(NOBODY), Some(NOBODY))?;
            }
        }
        libvirt.install_virsh()?;
        Ok(libvirt)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A domain whose guest is the oracle.
    fn xml(&self) -> Result<String> {
        let place = |name: &str| text(&self.path(name)).to_owned();
        let binary = Qemu::V7.binary();
        Ok(format!(
            "<domain type='qemu'><name>oracle</name><memory unit='MiB'>{MIB}</memory><vcpu>1</vcpu>
             <os><type arch='x86_64' machine='pc'>hvm</type>
               <kernel>{}</kernel><initrd>{}</initrd><cmdline>{}</cmdline></os>
             <features><acpi/></features>
             <devices><emulator>{}</emulator>
               <serial type='file'><source path='{}' append='on'/><target port='0'/></serial>
               <serial type='unix'><source mode='bind' path='{}'/><target port='1'/></serial>
               <controller type='usb' model='none'/><memballoon model='none'/>
             </devices></domain>",
            place("vmlinuz"),
            place("initramfs.cpio"),
            options(Qemu::V7).kernel_command_line(),
            text(&binary),
            place("guest/serial0.log"),
            place("guest/serial1.sock"),
        ))
    }

    /// A `virsh` for this libvirt. What it reads comes by a pipe of its own user's:
    /// another's can't be opened as `/dev/stdin`.
    fn install_virsh(&self) -> Result<()> {
        let folder = text(self.folder.path());
        let give_up = match fs::metadata(folder)?.uid() {
            NOBODY => "setpriv --reuid=65534 --regid=65534 --clear-groups",
            _ => "",
        };
        let script = format!(
            "#!/bin/sh
             unset XDG_RUNTIME_DIR XDG_CACHE_HOME XDG_CONFIG_HOME XDG_DATA_HOME
             cd {folder}; export HOME={folder} LIBVIRT_DEFAULT_URI='qemu:///embed?root={folder}/root'
             exec {give_up} sh -c 'cat | /usr/bin/virsh \"$@\"' virsh \"$@\"\n"
        );
        let path = self.path("bin/virsh");
        fs::write(&path, script)?;
        Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
    }

    /// PATH with that virsh.
    fn search_path(&self) -> String {
        let path = std::env::var("PATH").unwrap_or_default();
        format!("{}:{path}", text(&self.path("bin")))
    }

    /// Has libvirt start the guest and save it: once it has booted, when its nonce is
    /// returned, or at once.
    fn save(&self, file: &str, booted: bool) -> Result<Option<String>> {
        let mut command = Command::new(self.path("bin/virsh"));
        command.arg("--quiet").stdin(Stdio::piped()).stdout(Stdio::null());
        command.stderr(fs::File::create(self.path("stderr"))?);
        let mut virsh = Virsh(spawn_bound(command)?);
        virsh.tell("create oracle.xml")?;
        let nonce = if booted { Some(self.boot(&mut virsh)?) } else { None };
        virsh.tell(&format!("save oracle {file}"))?;
        virsh.tell("quit")?;
        virsh.0.stdin = None;
        let status = wait_for(SOON, "virsh to end", || Ok(virsh.0.try_wait()?))?;
        assert!(status.success(), "{}", fs::read_to_string(self.path("stderr"))?);
        Ok(nonce)
    }

    fn boot(&self, virsh: &mut Virsh) -> Result<String> {
        wait_for(5 * SOON, "libvirt's guest to be ready", || {
            let complaint = fs::read_to_string(self.path("stderr"))?;
            if complaint.contains("error:") || virsh.0.try_wait()?.is_some() {
                return Err(format!("virsh can't start it: {complaint}").into());
            }
            let said = fs::read_to_string(self.path("guest/serial0.log")).unwrap_or_default();
            Ok(said.contains("ORACLE READY").then_some(()))
        })?;
        Oracle::connect(&self.path("guest/serial1.sock"))?.nonce()
    }
}

/// A virsh that waits for commands. Dropping it ends its guest too.
struct Virsh(Child);

impl Virsh {
    fn tell(&mut self, command: &str) -> Result<()> {
        let stdin = self.0.stdin.as_mut().ok_or("virsh has no input")?;
        Ok(writeln!(stdin, "{command}")?)
    }
}

impl Drop for Virsh {
    fn drop(&mut self) {
        // It may have ended: then nobody reads, and there is nothing to end.
        let _ = self.tell("destroy oracle");
        let _ = self.tell("quit");
        self.0.stdin = None;
        let _ = wait_for(SOON, "virsh to end", || Ok(self.0.try_wait()?));
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The same file with its stream compressed, as libvirt would have written it with this
/// number in its header (`virQEMUSaveFormat`).
fn compressed(raw: &[u8], number: u32, tool: &str, to: &Path) -> Result<()> {
    let data_len = u32::from_le_bytes(raw[20..24].try_into()?) as usize;
    let (header, stream) = raw.split_at(92 + data_len);
    let mut header = header.to_vec();
    header[28..32].copy_from_slice(&number.to_le_bytes());
    fs::write(to, header)?;
    let out = fs::File::options().append(true).open(to)?;
    let mut child = Command::new(tool)
        .args((tool != "cat").then_some("-c"))
        .stdin(Stdio::piped())
        .stdout(out)
        .spawn()?;
    child.stdin.take().ok_or("no input")?.write_all(stream)?;
    assert!(child.wait()?.success());
    Ok(())
}

fn a_guest_that_libvirt_saved_reverts(dir: &Dir) -> Result<()> {
    let libvirt = Libvirt::new()?;
    let nonce = libvirt.save("oracle.save", true)?.ok_or("no nonce")?;
    let saved = libvirt.path("oracle.save");

    // libvirt makes a command line of its XML.
    let image = dir.path("vm.snap");
    let import = dir.snapback(&["import", text(&saved), text(&image)]);
    let ended = import.env("PATH", &libvirt.search_path()).succeed()?;
    assert_eq!(ended.event("imported")?["running"], true);
    assert!(ended.event("note")?["what"].to_string().contains("domxml-to-native"));
    let info = dir.snapback(&["info", text(&image)]).succeed()?.events.remove(0);
    assert!(info["libvirt_xml"].as_str().is_some_and(|xml| xml.contains("<name>oracle</name>")));
    let mut reverted = dir.reverted(&image, &libvirt.path("guest"), "reverted")?;
    reverted.resident()?;
    reverted.check(&nonce)?;
    drop(reverted);

    // Where there is no virsh, the command line has to be given.
    let words: Vec<_> = info["command_line"].as_array().ok_or("no command line")?.iter().collect();
    let words: Vec<_> = words.iter().filter_map(|word| word.as_str()).collect();
    let refusal =
        dir.snapback(&["import", text(&saved), "no.snap"]).env("PATH", "/nowhere").fail()?;
    assert!(refusal.contains("`virsh` can't be run") && refusal.contains("--command"), "{refusal}");

    // One that is small, compressed as libvirt can be told to.
    libvirt.save("small.save", false)?;
    let raw = fs::read(libvirt.path("small.save"))?;
    for (number, tool) in
        [(0, "cat"), (1, "gzip"), (2, "bzip2"), (3, "xz"), (4, "lzop"), (5, "zstd")]
    {
        let (file, image) = (dir.path(tool), dir.path(&format!("{tool}.snap")));
        compressed(&raw, number, tool, &file)?;
        let import = || dir.snapback(&["import", text(&file), text(&image), "--"]).with(&words);
        import().succeed()?;
        let info = |name| -> Result<Vec<_>> {
            let info = dir.snapback(&["info", text(&dir.path(name))]).succeed()?.events.remove(0);
            let same = ["data_pages", "zero_pages", "machine_type", "running", "libvirt_xml"];
            Ok(same.map(|field| info[field].clone()).to_vec())
        };
        assert_eq!(info(&format!("{tool}.snap"))?, info("cat.snap")?, "{tool}");
        // Cut in the middle, it is named.
        let cut = dir.path("cut");
        fs::copy(&file, &cut)?;
        fs::File::options().write(true).open(&cut)?.set_len(fs::metadata(&file)?.len() / 2)?;
        let import = dir.snapback(&["import", text(&cut), "no.snap", "--"]).with(&words);
        let refusal = import.fail()?;
        assert!(refusal.contains(text(&cut)), "{refusal}");
        assert!(!dir.path("no.snap").exists());
    }
    Ok(())
}
