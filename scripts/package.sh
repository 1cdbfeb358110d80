#!/usr/bin/env bash
# Checks the crate as cargo would publish it: what is in it, its size, its licence texts, and that it
# builds alone.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck disable=SC2034 # used by common.sh
me=package
# shellcheck source=scripts/common.sh
. "$here/common.sh"

# The most bytes that the crate may have, packed.
limit=$((2 << 20))

cd "$here/.."
files=$(cargo package --locked --allow-dirty --list)
for file in LICENSE-MIT LICENSE-APACHE README.md CHANGELOG.md Cargo.lock src/main.rs; do
    grep -qx "$file" <<<"$files" || die "$file is missing"
done
! grep -E '^(scripts|clients|fuzz|tests|benches|packaging)/|\.snap$' <<<"$files" ||
    die "the lines above are of the repository alone"
cargo package --locked --allow-dirty --quiet
crate=target/package/snapback-$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1).crate
size=$(stat -c %s "$crate")
[ "$size" -le "$limit" ] || die "$crate has $size bytes, more than $limit"
say "$crate: $(wc -l <<<"$files") files, $size bytes"
