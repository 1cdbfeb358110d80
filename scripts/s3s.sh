#!/usr/bin/env bash
# Builds s3s-fs, a server that speaks S3, for the tests and benchmarks of repositories: s3s-fs/ in
# the deps folder. `make setup` comes first.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
deps=${SNAPBACK_DEPS:-$here/../.deps}
# shellcheck disable=SC2034 # used by common.sh
me=s3s
. "$here/common.sh"

# Later versions need a newer compiler.
version=0.14.1

deps=$(cd "$deps" && pwd)
stamp=$deps/stamps/s3s-fs-$version
[ ! -e "$stamp" ] || exit 0
# Not set-up's lock, which others hold meanwhile.
exec 9>"$deps/lock-s3s"
flock 9
[ ! -e "$stamp" ] || exit 0

say "building s3s-fs $version"
# What all data passes is optimised, the rest is built in half the time without.
fast=()
for package in base64-simd crc-fast crc32c hex-simd md-5 memchr sha1 sha2; do
    fast+=(--config "profile.dev.package.$package.opt-level=2")
done
CARGO_PROFILE_DEV_DEBUG=none cargo install --quiet --locked --debug "${fast[@]}" --version "$version" \
    --features binary --root "$deps/s3s-fs" --target-dir "$deps/s3s-target" s3s-fs
rm -rf "$deps/s3s-target"
touch "$stamp"
