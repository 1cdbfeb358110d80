#!/usr/bin/env bash
# Runs openQA's os-autoinst, as Debian 13 ships it, on the guest of the tests: a milestone, and two
# rollbacks, by its own means and then by snapback (examples/os-autoinst). Prints for both how long
# the guest stood still for the milestone, and how long each rollback took.
#
# A Debian 13 with os-autoinst and QEMU is installed in trixie/ in the deps folder, once (1 GB).
# Root is asked for. `make setup`, `make guest` and a release build of snapback come first.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
deps=${SNAPBACK_DEPS:-$here/../.deps}
me=openqa
. "$here/common.sh"

snapback=${1:?"the program snapback"}
command -v mmdebstrap >/dev/null || die "mmdebstrap is missing; run: make setup"
deps=$(cd "$deps" && pwd)
root=$deps/trixie
exec 9>"$deps/lock-trixie"
flock 9

install_trixie() {
    local new=$root.new uri
    uri=$(mirror)
    say "installing Debian trixie with os-autoinst from $uri"
    as_root rm -rf "$new"
    as_root mmdebstrap --quiet --mode=root --variant=apt \
        --include=os-autoinst,qemu-system-x86,qemu-utils \
        --aptopt='APT::Install-Recommends "false"' \
        --aptopt='Acquire::Languages "none"' \
        --dpkgopt=force-unsafe-io \
        --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/man/*' \
        trixie "$new" "deb $uri trixie main" || die "can't install Debian trixie from $uri"
    as_root mv "$new" "$root"
}
[ -x "$root/usr/bin/isotovideo" ] || install_trixie

# What os-autoinst works with, and where: a directory of its own in that Debian.
work=$(as_root mktemp -d "$root/openqa.XXXXXX")
inside=/${work##*/}
mounted=
clean_up() {
    # shellcheck disable=SC2086 # one word a directory
    for directory in $mounted; do
        as_root umount "$root/$directory" || say "$root/$directory is still mounted"
    done
    as_root rm -rf "$work"
}
trap clean_up EXIT
for directory in proc dev sys; do
    as_root mount --bind "/$directory" "$root/$directory"
    mounted="$directory $mounted"
done
as_root cp -r "$here/../examples/os-autoinst" "$work/distribution"
as_root cp "$deps/vmlinuz" "$deps/initramfs.cpio" "$work/"
as_root install -m 755 "$snapback" "$work/snapback"
printf '#!/bin/sh\nexec qemu-system-x86_64 -accel tcg "$@"\n' | as_root tee "$work/qemu" >/dev/null
as_root chmod 755 "$work/qemu"

# run NAME [VARIABLES]: one run of os-autoinst.
run() {
    local name=$1 pool=$work/$1 log
    as_root mkdir "$pool"
    as_root tee "$pool/vars.json" >/dev/null <<J
{"BACKEND": "qemu", "DISTRI": "example", "ARCH": "x86_64", "WORKER_ID": "1", "WORKER_INSTANCE": "1",
 "CASEDIR": "$inside/distribution", "PRODUCTDIR": "$inside/distribution",
 "NEEDLES_DIR": "$inside/distribution/needles", "QEMU_NO_KVM": "1", "QEMUCPU": "qemu64",
 "QEMURAM": "1024", "KERNEL": "$inside/vmlinuz", "INITRD": "$inside/initramfs.cpio",
 "APPEND": "console=ttyS0 quiet no_timer_check oracle.fill_mib=400 oracle.rate=200 oracle.beat_ms=500",
 "NUMDISKS": "1", "HDDSIZEGB": "1", "VNC": "95", "QEMUPORT": "20012", "QEMU_VIRTIO_RNG": "0",
 "VIRTIO_CONSOLE": "0", "NOVIDEO": "1", "QEMU_AUDIOBACKEND": "none"${2:+, $2}}
J
    log=$pool/log
    say "os-autoinst with $name milestones"
    as_root chroot "$root" sh -c "cd $inside/$name && QEMU=$inside/qemu SNAPBACK=$inside/snapback \
        timeout 600 isotovideo -d" 2>&1 | as_root tee "$log" >/dev/null ||
        say "isotovideo has failed"
    as_root cat "$log"
}
