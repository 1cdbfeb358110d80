//! The program of the package `snapback` needs no libvirt; that of the package `snapback-libvirt` takes
//! its place where it is installed.

/// Becomes the program that is linked with libvirt, if this one was built to know where that would
/// be, and it is there.
#[cfg(not(feature = "libvirt"))]
pub(super) fn to_program_with_libvirt() {
    use std::os::unix::process::CommandExt;

    let Some(program) = option_env!("SNAPBACK_LIBVIRT_PROGRAM") else { return };
    let mut arguments = std::env::args_os();
    let mut command = std::process::Command::new(program);
    command.arg0(arguments.next().unwrap_or_else(|| "snapback".into()));
    // It returns only where that can't be: nearly always since there is none.
    let error = command.args(arguments).exec();
    if error.kind() != std::io::ErrorKind::NotFound {
        eprintln!("snapback: {program} can't be run: {error}; going on without libvirt");
    }
}

#[cfg(feature = "libvirt")]
pub(super) fn to_program_with_libvirt() {}
