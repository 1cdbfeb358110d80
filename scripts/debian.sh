#!/usr/bin/env bash
# Builds the disk of the Debian guest (tests/debian/README.md): a Debian 12 with
# PostgreSQL 15, a loaded database in it, and an init of our own. The result is
# debian.raw in the deps folder, a sparse file with an ext4 file system; it is
# built once. `make setup` comes first.
#
# Root is asked for: the packages are installed in a chroot.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
deps=${SNAPBACK_DEPS:-$here/../.deps}
guest=$here/../tests/debian
me=debian
. "$here/common.sh"

# Bytes of the disk, and the scale of pgbench: 16 MB of database each.
size=1536M
scale=10

command -v mmdebstrap >/dev/null || die "mmdebstrap is missing; run: make setup"
deps=$(cd "$deps" && pwd)
exec 9>"$deps/lock"
flock 9

# The stamp tells what the disk was built from.
disk=$deps/debian.raw stamp=$deps/stamps/debian
made_of=$(cat "$0" "$guest"/* | sha256sum)
if [ -e "$disk" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$made_of" ]; then
    exit 0
fi

# The folder is root's when it is filled, and goes as it came.
tree=$(mktemp -d "$deps/debian.XXXXXX")
trap 'as_root rm -rf "$tree" "$disk.new"' EXIT
uri=$(mirror)
say "installing Debian $release with PostgreSQL from $uri"
as_root env SCALE="$scale" mmdebstrap --quiet --mode=root --variant=minbase --format=directory \
    --include=postgresql-15,qemu-guest-agent \
    --dpkgopt=force-unsafe-io \
    --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --aptopt='Acquire::Languages "none"' \
    --customize-hook="copy-in $guest/init /sbin" \
    --customize-hook="copy-in $guest/journal /usr/local/bin" \
    --customize-hook="copy-in $guest/guest.conf /etc/postgresql/15/main/conf.d" \
    --customize-hook="$guest/load.sh \"\$1\"" \
    "$release" "$tree/root" "deb $uri $release main" ||
    die "can't install Debian $release from $uri"

# mke2fs fills the file system by itself: no loop device, no mount.
as_root mke2fs -q -t ext4 -L debian -d "$tree/root" "$disk.new" "$size" >/dev/null
as_root chown "$(id -u):$(id -g)" "$disk.new"
mv "$disk.new" "$disk"
echo "$made_of" >"$stamp"
say "built $disk"
