#!/usr/bin/env bash
# Runs openQA's os-autoinst, as Debian 13's backports ship it, on the guest of the tests: a milestone, and two
# rollbacks, by its own means and then by snapback (examples/os-autoinst). Prints for both how long
# the guest stood still for the milestone, and how long each rollback took.
#
# A Debian 13 with os-autoinst and QEMU is installed in trixie/ in the deps folder, once (1 GB).
# Root is asked for. `make setup`, `make guest` and a release build of snapback come first.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
deps=${SNAPBACK_DEPS:-$here/../.deps}
# shellcheck disable=SC2034 # used by common.sh
me=openqa
# shellcheck source=scripts/common.sh
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
    # That of trixie itself saves no guest of its own QEMU, which has lost what it asks for.
    # shellcheck disable=SC2016 # the hook's own argument: the directory of that Debian
    as_root mmdebstrap --quiet --mode=root --variant=apt \
        --customize-hook='chroot "$1" env DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq \
            -t trixie-backports os-autoinst qemu-system-x86 qemu-utils >/dev/null' \
        --aptopt='APT::Install-Recommends "false"' \
        --aptopt='Acquire::Languages "none"' \
        --dpkgopt=force-unsafe-io \
        --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/man/*' \
        trixie "$new" "deb $uri trixie main" "deb $uri trixie-backports main" ||
        die "can't install Debian trixie from $uri"
    as_root mv "$new" "$root"
}
[ -x "$root/usr/bin/isotovideo" ] || install_trixie

# What os-autoinst works with, and where: a directory of its own in that Debian.
work=$(as_root mktemp -d "$root/openqa.XXXXXX")
inside=/${work##*/}
trap 'as_root rm -rf "$work"' EXIT
# in_trixie COMMAND...: runs it in that Debian. Mounts and processes are of namespaces of their own,
# and go with it.
in_trixie() {
    # shellcheck disable=SC2016 # its own arguments
    as_root unshare --mount --pid --fork --kill-child sh -c '
        mount --bind /dev "$0/dev" && mount --bind /sys "$0/sys" && mount -t proc proc "$0/proc" &&
            exec chroot "$0" "$@"' "$root" "$@"
}
as_root cp -rL "$here/../examples/os-autoinst" "$work/distribution"
as_root cp -L "$deps/vmlinuz" "$deps/initramfs.cpio" "$work/"
as_root install -D -m 755 "$snapback" "$work/bin/snapback"
printf '#!/bin/sh\nexec qemu-system-x86_64 -accel tcg "$@"\n' | as_root tee "$work/qemu" >/dev/null
as_root chmod 755 "$work/qemu"

# run NAME VARIABLES: one run of os-autoinst. It puts quotes around APPEND that reach the guest, where
# they spoil the first word and the last.
run() {
    local name=$1 pool=$work/by-$1
    as_root mkdir "$pool"
    as_root tee "$pool/vars.json" >/dev/null <<J
{"BACKEND": "qemu", "DISTRI": "example", "ARCH": "x86_64", "WORKER_ID": "1", "WORKER_INSTANCE": "1",
 "CASEDIR": "$inside/distribution", "PRODUCTDIR": "$inside/distribution",
 "NEEDLES_DIR": "$inside/distribution/needles", "QEMU_NO_KVM": "1", "QEMUCPU": "qemu64",
 "QEMURAM": "1024", "KERNEL": "$inside/vmlinuz", "INITRD": "$inside/initramfs.cpio",
 "APPEND": "quiet no_timer_check oracle.fill_mib=400 oracle.rate=200 oracle.beat_ms=500 quiet",
 "NUMDISKS": "1", "HDDSIZEGB": "1", "VNC": "95", "QEMUPORT": "20012", "QEMU_VIRTIO_RNG": "0",
 "VIRTIO_CONSOLE": "0", "NOVIDEO": "1", "QEMU_AUDIOBACKEND": "none", "STORAGE_KEEP_FREE_GB": "0", $2}
J
    say "os-autoinst, milestones by $name"
    # It fails, as two of its tests do.
    in_trixie sh -c "cd $inside/by-$name && QEMU=$inside/qemu SNAPBACK=$inside/bin/snapback \
        XDG_RUNTIME_DIR=$inside timeout 600 isotovideo -d" >"$deps/openqa-$name.log" 2>&1 || true
    sed 's/\x1b\[[0-9;]*m//g' "$deps/openqa-$name.log" | python3 "$here/openqa_times.py"
    grep -q 'finished works' "$deps/openqa-$name.log" ||
        die "it came to no end: see $deps/openqa-$name.log"
}
# The guest wants a second serial port.
run itself '"QEMU_APPEND": "serial null"'
run snapback '"QEMU_APPEND": "serial null -qmp unix:snapback.sock,server=on,wait=off",
 "SNAPBACK_MILESTONES": "1"'
