//! Domains whose memory QEMU maps from a flat image: nobody serves it. The libvirt
//! is a newer one, and runs QEMU 10 as where it is installed: as another user, with namespaces and a
//! list of devices.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::harness::{Dir, check, text};
use crate::reverting::revert;
use crate::saving::{ask, save};
use crate::support::libvirt::{Libvirt, domain_options};
use crate::support::{Attached, Oracle, Result};
use crate::tests;

tests! {
    a_flat_image_is_mapped_under_libvirt
}

fn a_flat_image_is_mapped_under_libvirt(dir: &Dir) -> Result<()> {
    let (libvirt, name) = (&Libvirt::start_newer()?, "mapped");
    let mut guest = libvirt.boot(&domain_options(name).with_two_disks())?;
    let (nonce, folder) = (guest.oracle.nonce()?, guest.dir.clone());
    ask(&mut guest, "disk write /dev/vda 64 7")?;
    save(dir, libvirt, name, "vm.snap").succeed()?;
    ask(&mut guest, "disk write /dev/vda 64 8")?;
    std::mem::forget(guest);
    let process = PathBuf::from(format!("/proc/{}", libvirt.pid_of(name)?));
    let daemon = fs::read_to_string(libvirt.path("run/libvirtd.pid"))?;
    let namespace = |process: &Path| fs::read_link(process.join("ns/mnt"));
    assert_ne!(namespace(&process)?, namespace(&Path::new("/proc").join(daemon.trim()))?);
    // QEMU, which is not root, opens it by itself.
    assert_ne!(fs::metadata(&process)?.uid(), 0);
    let (image, flat) = (dir.path("vm.snap"), folder.join("flat.snap"));
    dir.snapback(&["flatten", text(&image), text(&flat), "--layout", "flat"]).succeed()?;
    fs::set_permissions(&flat, fs::Permissions::from_mode(0o644))?;
    let check_it = |guest: &mut Attached| -> Result<()> {
        assert_eq!(guest.oracle.nonce()?, nonce);
        ask(guest, "disk check /dev/vda 64 7")?;
        check(guest)
    };

    let replace = ["--replace", "--place", "map"];
    let ended = revert(dir, libvirt, &flat, name).with(&replace).succeed()?;
    assert_eq!(ended.event("placing")?["way"], "map");
    let pid = libvirt.pid_of(name)?;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    assert!(maps.contains("/flat.snap\n"), "{maps}");
    let mut guest = Attached::to(pid, &folder)?;
    check_it(&mut guest)?;
    std::mem::forget(guest);

    // A sibling, beside it.
    let sibling = ["--new", "beside", "--place", "map"];
    revert(dir, libvirt, &flat, name).with(&sibling).succeed()?;
    let mut oracle = Oracle::connect(&folder.join("beside-serial1.sock"))?;
    assert_eq!(oracle.nonce()?, nonce);
    assert!(oracle.check()?.ok());
    libvirt.virsh(&["destroy", "beside"])?;

    let uri = libvirt.uri();
    let bench = ["bench", text(&flat), "--domain", name, "--connect", &uri, "--runs", "1"];
    let ended = dir.snapback(&bench).succeed()?;
    let runs = ended.events.iter().filter(|event| event["event"] == "run");
    let ways: Vec<&str> = runs.filter_map(|run| run["way"].as_str()).collect();
    assert_eq!(ways, ["domain", "domain+map"]);
    let files = fs::read_dir(&folder)?.flatten();
    let mut names = files.map(|entry| entry.file_name().to_string_lossy().into_owned());
    assert!(!names.any(|name| name.contains("snapback-bench")));

    // Saved and restored by libvirt, and imported: the image has the memory's own name. The file's
    // format leaves out pages of zeros (`sparse`, number 6 in its header).
    let file = libvirt.path("mapped.save");
    libvirt.virsh(&["save", name, text(&file)])?;
    let mut header = [0; 32];
    fs::File::open(&file)?.read_exact(&mut header)?;
    assert_eq!(header[28..], 6_u32.to_ne_bytes());
    libvirt.virsh(&["restore", text(&file)])?;
    let mut guest = Attached::to(libvirt.pid_of(name)?, &folder)?;
    check_it(&mut guest)?;
    std::mem::forget(guest);
    let refusal = save(dir, libvirt, name, "again.snap").fail()?;
    assert!(refusal.contains("flat.snap"), "{refusal}");
    let again = dir.path("again.snap");
    let import = dir.snapback(&["import", text(&file), text(&again)]);
    import.env("LIBVIRT_DEFAULT_URI", &libvirt.uri()).succeed()?;
    let ended = revert(dir, libvirt, &again, name).with(&["--replace"]).succeed()?;
    assert_eq!(ended.event("placing")?["way"], "uffd");
    let mut guest = Attached::to(libvirt.pid_of(name)?, &folder)?;
    check_it(&mut guest)?;
    std::mem::forget(guest);
    libvirt.virsh(&["destroy", name]).map(drop)
}
