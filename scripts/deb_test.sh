#!/usr/bin/env bash
# Tries the Debian packages in clean Debians, 12 and 13: installs them, uses them by the README's first
# commands (a save and a revert of the tests' guest, under QEMU's emulation), upgrades, removes and purges
# them. `make deb` and `make guest` come first.
#
#   deb_test.sh                     both
#   deb_test.sh bookworm            one of them
#
# The Debians are installed into clean-NAME/ in the deps folder, once; each test works on an overlay over
# it, which goes with its namespace. Root is asked for.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
deps=${SNAPBACK_DEPS:-$here/../.deps}
me=deb-test
# shellcheck source=scripts/common.sh
. "$here/common.sh"

command -v mmdebstrap >/dev/null || die "mmdebstrap is missing; run: make setup"
deps=$(cd "$deps" && pwd)
packages=$(cd "$here/../target/debian" && pwd) || die "there are no packages; run: make deb"
exec 9>"$deps/lock-clean"
flock 9

# What is asked of a Debian: the packages' dependencies, and what the test uses.
tools=qemu-system-x86,libvirt0,bash-completion,fish,man-db,groff-base,python3-minimal,apparmor,systemd

install_clean() {
    local name=$1 root=$2 uri
    uri=$(mirror)
    say "installing Debian $name from $uri"
    as_root rm -rf "$root.new"
    as_root mmdebstrap --quiet --mode=root --variant=minbase --include="$tools" \
        --aptopt='APT::Install-Recommends "false"' \
        --aptopt='Acquire::Languages "none"' \
        --dpkgopt=force-unsafe-io \
        "$name" "$root.new" "deb $uri $name main" || die "can't install Debian $name from $uri"
    as_root mv "$root.new" "$root"
}

# older PACKAGE FILE : the package as one of an older version, as which it is upgraded.
older() {
    local tree
    tree=$(mktemp -d)
    dpkg-deb -R "$1" "$tree"
    sed -i 's/^Version: .*/Version: 0.1.0-1/' "$tree/DEBIAN/control"
    echo '# of 0.1.0' >>"$tree/etc/snapback/config.toml"
    (cd "$tree" && find . -path ./DEBIAN -prune -o -type f -printf '%P\0' |
        xargs -0 md5sum >DEBIAN/md5sums)
    dpkg-deb --build --root-owner-group "$tree" "$2" >/dev/null
    rm -rf "$tree"
}

try() {
    local name=$1 root=$deps/clean-$1 work
    [ -x "$root/usr/bin/systemd-analyze" ] || install_clean "$name" "$root"
    work=$(as_root mktemp -d "$deps/clean-work.XXXXXX")
    # The trap runs with what `work` is now.
    # shellcheck disable=SC2064
    trap "as_root rm -rf '$work'" EXIT
    as_root mkdir -p "$work/upper/srv/test" "$work/layer" "$work/root"
    as_root cp "$packages"/*.deb "$here/deb_inside.sh" "$here/qmp.py" "$work/upper/srv/test/"
    as_root cp -L "$deps/vmlinuz" "$deps/initramfs.cpio" "$work/upper/srv/test/"
    older "$(echo "$packages"/snapback_*.deb)" "$packages/older.deb"
    as_root mv "$packages/older.deb" "$work/upper/srv/test/older.deb"
    say "Debian $name"
    # Mounts and processes are of namespaces of their own, and go with it.
    # shellcheck disable=SC2016 # its own arguments
    as_root unshare --mount --pid --net --fork --kill-child sh -c '
        mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/layer" "$2/root" &&
            mount --bind /dev "$2/root/dev" && mount --bind /sys "$2/root/sys" &&
            mount -t proc proc "$2/root/proc" && mount -t tmpfs tmpfs "$2/root/run" &&
            exec chroot "$2/root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
                bash /srv/test/deb_inside.sh' sh "$root" "$work" || die "failed in Debian $name"
    as_root rm -rf "$work"
    trap - EXIT
}

for name in "${@:-bookworm}"; do try "$name"; done
[ $# -gt 0 ] || try trixie
