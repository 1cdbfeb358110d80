#!/usr/bin/env bash
# Sets up what the tests, the demo and the benchmarks need on a Debian 12:
#
#   by apt, as root       the packages of scripts/packages.txt
#   into the deps folder  qemu-10.0/     QEMU 10.0 of bookworm-backports, unpacked
#                         libvirt-11.3/  libvirt 11.3 of the same, unpacked
#                         kernel/        Debian's cloud kernel, unpacked
#                         vmlinuz        a link to that kernel's image
#                         vmlinux        the same, not compressed
#                         arm64/         the kernel and busybox of an arm64 guest,
#                                        unpacked, and a link vmlinuz as above
#
# The deps folder is .deps in the project, or $SNAPBACK_DEPS. Every step leaves a
# stamp when it is done and is skipped from then on; removing the folder starts
# over. The system's apt sources are never changed.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
deps=${SNAPBACK_DEPS:-$here/../.deps}
me=setup
. "$here/common.sh"

command -v apt-get >/dev/null && command -v dpkg-query >/dev/null ||
    die "needs Debian's apt-get and dpkg; elsewhere, install QEMU 7.2 and 10.0 and set SNAPBACK_TEST_QEMU_7 and SNAPBACK_TEST_QEMU_10"
[ "$(dpkg --print-architecture)" = amd64 ] || die "only amd64 hosts are supported"

mkdir -p "$deps"
deps=$(cd "$deps" && pwd)
mkdir -p "$deps/stamps"

# Two set-ups at once would unpack over each other.
exec 9>"$deps/lock"
flock 9

# --- as root: packages ------------------------------------------------------

missing_packages() {
    local package
    sed 's/#.*//' "$here/packages.txt" | while read -r package; do
        [ -n "$package" ] || continue
        # shellcheck disable=SC2016 # the format is dpkg-query's, not the shell's
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
            echo "$package"
    done
}

install_packages() {
    local missing updated=
    # Twice at most: installing one package may remove another that was there in a version
    # which goes with a newer QEMU.
    for _ in 1 2; do
        missing=$(missing_packages)
        [ -n "$missing" ] || return 0
        # shellcheck disable=SC2086 # one word a package
        set -- $missing
        say "installing: $*"
        [ -n "$updated" ] || as_root apt-get update -q
        updated=yes
        as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y -q --no-install-recommends "$@" </dev/null
    done
    missing=$(missing_packages)
    [ -z "$missing" ] || die "can't be installed together: $missing"
}

# --- as anybody: packages unpacked into the deps folder -----------------------

# A private apt: sources, lists and caches of its own, the system's proxies and
# keys. Without arguments it would read the system's sources, and know the system's
# architectures only.
private_apt() {
    local tool=$1
    shift
    "$tool" \
        -o Dir::Etc::SourceList="$deps/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::State::Lists="$deps/apt/lists" -o Dir::Cache="$deps/apt/cache" \
        -o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
        -o APT::Architectures=amd64,arm64 -o APT::Sandbox::User=root "$@"
}

refresh_lists() {
    [ -z "${lists_fresh:-}" ] || return 0
    local keyring=/usr/share/keyrings/debian-archive-keyring.gpg uri options=
    uri=$(mirror)
    [ ! -e "$keyring" ] || options="[signed-by=$keyring] "
    mkdir -p "$deps/apt/lists/partial" "$deps/apt/cache/archives/partial"
    printf "deb $options%s %s main\n" "$uri" "$release" "$uri" "$release-backports" \
        >"$deps/apt/sources.list"
    say "reading package lists of $uri"
    private_apt apt-get -q update || die "can't read the package lists of $uri"
    lists_fresh=yes
}

# unpack FOLDER PACKAGE... : downloads the packages and unpacks them there. A
# package may be given as NAME/SUITE, and NAME as NAME:ARCHITECTURE.
unpack() {
    local folder=$1 archive
    shift
    rm -rf "$folder" "$deps/downloads"
    mkdir -p "$folder" "$deps/downloads"
    (cd "$deps/downloads" && private_apt apt-get -q download "$@") || die "can't download $*"
    for archive in "$deps"/downloads/*.deb; do
        dpkg -x "$archive" "$folder"
    done
    rm -rf "$deps/downloads"
}

unpack_qemu() {
    local folder=$deps/qemu-10.0 suite=$release-backports absent
    refresh_lists
    say "unpacking QEMU 10.0 of $suite"
    unpack "$folder" "qemu-system-x86/$suite" "qemu-system-arm/$suite" \
        "qemu-system-common/$suite" "qemu-system-data/$suite" "seabios/$suite"
    absent=$(ldd "$folder"/usr/bin/qemu-system-{x86_64,aarch64} | grep 'not found' || true)
    [ -z "$absent" ] || die "QEMU 10.0 lacks libraries; add their packages to scripts/packages.txt:
$absent"
}

unpack_libvirt() {
    local folder=$deps/libvirt-11.3 suite=$release-backports absent
    local lib=$folder/usr/lib/x86_64-linux-gnu
    refresh_lists
    say "unpacking libvirt 11.3 of $suite"
    unpack "$folder" "libvirt-daemon/$suite" "libvirt-daemon-common/$suite" \
        "libvirt-daemon-driver-qemu/$suite" "libvirt-daemon-log/$suite" \
        "libvirt0/$suite" "libvirt-common/$suite"
    absent=$(LD_LIBRARY_PATH=$lib ldd "$folder"/usr/sbin/{libvirtd,virtlogd} \
        "$lib/libvirt/connection-driver/libvirt_driver_qemu.so" | grep 'not found' || true)
    [ -z "$absent" ] || die "libvirt 11.3 lacks libraries; add their packages to scripts/packages.txt:
$absent"
}

# kernel_package ARCHITECTURE : the package of Debian's newest cloud kernel.
kernel_package() {
    local package
    package=$(private_apt apt-cache depends --important "linux-image-cloud-$1:$1" |
        sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
    [ -n "$package" ] || die "linux-image-cloud-$1 depends on no kernel package"
    echo "$package"
}

# link_kernel FOLDER LINK PACKAGE : has LINK lead to the image of the kernel unpacked in
# FOLDER, which lies beside it.
link_kernel() {
    local package=${3%:*}
    ln -sfn "$(basename "$1")/boot/vmlinuz-${package#linux-image-}" "$2"
    [ -e "$2" ] || die "$package holds no kernel image at $(readlink "$2")"
}

unpack_kernel() {
    local package
    refresh_lists
    package=$(kernel_package amd64)
    say "unpacking $package"
    unpack "$deps/kernel" "$package"
    link_kernel "$deps/kernel" "$deps/vmlinuz" "$package"
    unpack_vmlinux "$deps/vmlinuz" "$deps/vmlinux"
}

# unpack_vmlinux IMAGE TO: the kernel in a compressed image, which QEMU starts as it is (PVH): a guest under TCG
# takes a second to decompress it. A link to the image where it is not compressed as Debian's is now.
unpack_vmlinux() {
    local at
    at=$(LC_ALL=C grep -abo -m 1 -P '\x02\x21\x4c\x18' "$1" | head -n 1 | cut -d : -f 1) || true
    # lz4 does not know where the kernel ends, and fails there.
    [ -z "$at" ] || tail -c +"$((at + 1))" "$1" | lz4 -dcq >"$2.new" || true
    if readelf -hW "$2.new" >/dev/null 2>&1; then
        mv "$2.new" "$2"
    else
        rm -f "$2.new"
        ln -sfn "$(basename "$1")" "$2"
    fi
}

unpack_arm64() {
    local package
    refresh_lists
    package=$(kernel_package arm64)
    say "unpacking $package and busybox for arm64"
    unpack "$deps/arm64/root" "$package" busybox-static:arm64
    # Its kernel needs no modules: they are most of what was unpacked.
    rm -rf "$deps/arm64/root/lib/modules"
    link_kernel "$deps/arm64/root" "$deps/arm64/vmlinuz" "$package"
}

# once NAME COMMAND... : runs the command unless it has succeeded before. The
# stamp's name carries a version: change it when the step's result changes.
once() {
    local stamp=$deps/stamps/$1
    shift
    [ ! -e "$stamp" ] || return 0
    "$@"
    touch "$stamp"
}

install_packages
once qemu-10.0-v2 unpack_qemu
once libvirt-11.3-v1 unpack_libvirt
once kernel-v2 unpack_kernel
once arm64-v1 unpack_arm64

case $(qemu-system-x86_64 --version | head -n 1) in
*" 7.2."*) ;;
*) [ -n "${SNAPBACK_TEST_QEMU_7:-}" ] ||
    die "$(command -v qemu-system-x86_64) is not QEMU 7.2; set SNAPBACK_TEST_QEMU_7 to one that is" ;;
esac
case $("$deps/qemu-10.0/usr/bin/qemu-system-x86_64" --version | head -n 1) in
*" 10.0."*) ;;
*) die "$deps/qemu-10.0 does not run as QEMU 10.0; remove $deps and try again" ;;
esac
