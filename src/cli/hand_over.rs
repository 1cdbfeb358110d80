//! The program of the package `snapback` needs no libvirt; that of the package `snapback-libvirt` takes
//! its place where it is installed.

/// Becomes the program that is linked with libvirt, if this one was built to know where that would
/// be, and it is there.
#[cfg(not(feature = "libvirt"))]
pub(super) fn to_program_with_libvirt() {
    use std::os::unix::process::CommandExt;

    let Some(program) = option_env!("SNAPBACK_LIBVIRT_PROGRAM") else { return };
    // An exec(3) of the standard library's that fails leaves SIGPIPE at its default, by which a server
    // in the background would die as soon as nobody reads what it prints: it is not tried in vain.
    if !std::path::Path::new(program).exists() {
        return;
    }
    let mut arguments = std::env::args_os();
    let mut command = std::process::Command::new(program);
    command.arg0(arguments.next().unwrap_or_else(|| "snapback".into()));
    let error = command.args(arguments).exec();
    eprintln!("snapback: {program} can't be run: {error}; remove the package snapback-libvirt");
    std::process::exit(super::FAILED.into());
}

#[cfg(feature = "libvirt")]
pub(super) fn to_program_with_libvirt() {}
