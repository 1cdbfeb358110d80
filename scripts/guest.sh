#!/usr/bin/env bash
# Builds the test guest: tests/guest as a static PID 1, and an initramfs of it and
# the kernel modules that a guest may ask for. The result is initramfs.cpio in the
# deps folder; `make setup` comes first.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
deps=${SNAPBACK_DEPS:-$here/../.deps}
target=x86_64-unknown-linux-gnu
modules="virtio virtio_ring virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk virtio_balloon \
    scsi_common scsi_mod sd_mod virtio_scsi libata ata_piix \
    failover net_failover virtio_net virtio_console virtio-rng"

[ -e "$deps/vmlinuz" ] || {
    echo "guest: $deps/vmlinuz is missing; run: make setup" >&2
    exit 1
}
deps=$(cd "$deps" && pwd)

# An explicit target keeps crt-static away from build scripts and proc macros.
RUSTFLAGS="-C target-feature=+crt-static" cargo build --quiet --release --locked \
    --manifest-path "$here/../tests/guest/Cargo.toml" \
    --target "$target" --target-dir "$deps/guest-target"
init=$deps/guest-target/$target/release/oracle

image=$deps/initramfs.cpio
if [ "$image" -nt "$init" ] && [ "$image" -nt "$0" ] && [ "$image" -nt "$deps/stamps/kernel-v1" ]; then
    exit 0
fi

tree=$(mktemp -d "$deps/initramfs.XXXXXX")
trap 'rm -rf "$tree"' EXIT
install -m 755 "$init" "$tree/init"
mkdir "$tree/dev" "$tree/proc" "$tree/modules"
for module in $modules; do
    find -L "$deps/kernel/lib/modules" -name "$module.ko" -exec install -m 644 {} "$tree/modules/" \;
    [ -e "$tree/modules/$module.ko" ] || {
        echo "guest: the kernel has no module $module.ko" >&2
        exit 1
    }
done
(cd "$tree" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0 >"$image.new")
mv "$image.new" "$image"
echo "guest: built $image"
