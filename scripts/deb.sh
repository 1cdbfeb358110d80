#!/usr/bin/env bash
# Builds the Debian packages `snapback` and `snapback-libvirt` into target/debian. The same sources give the
# same bytes, wherever they lie (scripts/reproducible.sh). cargo-deb is put into the deps folder. `make
# setup` comes first.
#
#   deb.sh          both packages
#   deb.sh program  the package `snapback` alone
#
# Programs are built in target/deb-build, with flags of their own.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
deps=${SNAPBACK_DEPS:-$here/../.deps}
# shellcheck disable=SC2034 # used by common.sh
me=deb
# shellcheck source=scripts/common.sh
. "$here/common.sh"
# shellcheck source=scripts/tools.sh
. "$here/tools.sh"

which=${1:-both}
# The bytes that the program may have.
most=15000000
mkdir -p "$deps"
deps=$(cd "$deps" && pwd)
cargo_deb
cd "$here/.."
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
grep -q "snapback (= $version-1)" Cargo.toml ||
    die "snapback-libvirt depends on another version than $version (Cargo.toml)"
project=$PWD
home=${CARGO_HOME:-$HOME/.cargo}
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null || date -r CHANGELOG.md +%s)
export SOURCE_DATE_EPOCH CARGO_INCREMENTAL=0 LC_ALL=C
# Neither this folder nor a user's name gets into the program.
RUSTFLAGS="--remap-path-prefix=$project=/snapback --remap-path-prefix=$home=/cargo"
# Relocations in the short form, which glibc 2.36 reads, and identical functions once: a smaller program, which
# starts sooner.
export RUSTFLAGS="$RUSTFLAGS -Clink-arg=-Wl,-z,pack-relative-relocs -Clink-arg=-Wl,--icf=safe"
export CFLAGS="-ffile-prefix-map=$project=/snapback -ffile-prefix-map=$home=/cargo"
# What hands over to the package snapback-libvirt.
export SNAPBACK_LIBVIRT_PROGRAM=/usr/lib/snapback/snapback

target=target/deb-build staged=target/deb
rm -rf "$staged" target/debian
mkdir -p "$staged" target/debian
build() { cargo build --config packaging/profile.toml --locked --release --target-dir "$target" "$@"; }

# package ARGUMENTS OF CARGO-DEB... : makes one, and tells its name, which comes last, and its size.
package() {
    local made
    made=$("$cargo_deb" --no-build --no-strip --deb-revision 1 --output target/debian "$@" | tail -n 1)
    say "built $made, $(stat -c %s "$made") bytes"
}

build --bin snapback --bin snapback-manual --features no-trace,manual
install -m 755 "$target/release/snapback" "$staged/snapback"
size=$(stat -c %s "$staged/snapback")
say "the program has $size bytes"
[ "$size" -le "$most" ] || say "that is MORE than the $most that it may have"
"$target/release/snapback-manual" "$staged/man"
find "$staged/man" -type f -exec gzip -9n {} +
/usr/bin/python3 scripts/sbom.py >"$staged/snapback.cdx.json"
package
[ "$which" = both ] || exit 0

build --bin snapback --features no-trace,libvirt
install -m 755 "$target/release/snapback" "$staged/snapback-libvirt"
package --variant libvirt
