#!/usr/bin/env bash
# Builds the test guests. `make setup` comes first.
#
#   initramfs.cpio        tests/guest as a static PID 1, and the kernel modules that a
#                         guest may ask for
#   arm64/initramfs.cpio  tests/arm64/init as PID 1, and busybox
#
# Both are in the deps folder.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
deps=${SNAPBACK_DEPS:-$here/../.deps}
target=x86_64-unknown-linux-gnu
modules="virtio virtio_ring virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk virtio_balloon \
    scsi_common scsi_mod sd_mod virtio_scsi libata ata_piix \
    failover net_failover virtio_net virtio_console virtio-rng button evdev"

for kernel in vmlinuz arm64/vmlinuz; do
    [ -e "$deps/$kernel" ] || {
        echo "guest: $deps/$kernel is missing; run: make setup" >&2
        exit 1
    }
done
deps=$(cd "$deps" && pwd)

# An explicit target keeps crt-static away from build scripts and proc macros.
RUSTFLAGS="-C target-feature=+crt-static" cargo build --quiet --release --locked \
    --manifest-path "$here/../tests/guest/Cargo.toml" \
    --target "$target" --target-dir "$deps/guest-target"
init=$deps/guest-target/$target/release/oracle

tree=
trap 'rm -rf "$tree"' EXIT

# is_newer IMAGE FILE... : whether it is newer than all that it is made of.
is_newer() {
    local image=$1 file
    shift
    for file in "$0" "$@"; do
        [ "$image" -nt "$file" ] || return 1
    done
}

# pack FOLDER IMAGE : makes an initramfs of what is in the folder.
pack() {
    (cd "$1" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0 >"$2.new")
    mv "$2.new" "$2"
    rm -rf "$1"
    echo "guest: built $2"
}

image=$deps/initramfs.cpio
if ! is_newer "$image" "$init" "$deps/stamps/kernel-v1"; then
    tree=$(mktemp -d "$deps/initramfs.XXXXXX")
    install -m 755 "$init" "$tree/init"
    mkdir "$tree/dev" "$tree/proc" "$tree/modules"
    for module in $modules; do
        find -L "$deps/kernel/lib/modules" -name "$module.ko" -exec install -m 644 {} "$tree/modules/" \;
        [ -e "$tree/modules/$module.ko" ] || {
            echo "guest: the kernel has no module $module.ko" >&2
            exit 1
        }
    done
    pack "$tree" "$image"
fi

image=$deps/arm64/initramfs.cpio init=$here/../tests/arm64/init
if ! is_newer "$image" "$init" "$deps/stamps/arm64-v1"; then
    tree=$(mktemp -d "$deps/initramfs.XXXXXX")
    install -m 755 "$init" "$tree/init"
    install -m 755 -D "$deps/arm64/root/bin/busybox" "$tree/bin/busybox"
    pack "$tree" "$image"
fi
