#!/usr/bin/env bash
# Holds Cargo.toml's `rust-version` against what is built: no crate in use may ask for a later Rust, and with a
# Rust of that version everything has to compile, where rustup has one (`rustup toolchain install 1.88.0`).
# What the standard library of that version lacks, `make lint` refuses (clippy's incompatible_msrv).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck disable=SC2034 # used by common.sh
me=minimum
# shellcheck source=scripts/common.sh
. "$here/common.sh"

cd "$here/.."
version=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
# As the program has them, and not those of other systems, which cargo names as well.
later=$(cargo metadata --locked --format-version 1 --features libvirt --filter-platform x86_64-unknown-linux-gnu |
    python3 -c '
import json, sys
number = lambda text: tuple(int(part) for part in text.split("."))
most = number(sys.argv[1])
packages = [p for p in json.load(sys.stdin)["packages"] if p["rust_version"]]
for package in packages:
    if number(package["rust_version"])[:2] > most:
        print(package["name"], package["version"], "asks for Rust", package["rust_version"])
' "$version")
[ -z "$later" ] || die "rust-version is $version, but
$later"
say "no crate in use asks for a later Rust than $version"

if toolchain=$(rustup toolchain list 2>/dev/null | grep -o "^$version\.[0-9]*-[^ ]*" | head -n 1) && [ -n "$toolchain" ]; then
    cargo "+$toolchain" check --locked --all-targets --features internals,libvirt --target-dir target/minimum
    say "everything compiles with $toolchain"
else
    say "it was NOT compiled with Rust $version: rustup has none (rustup toolchain install $version.0)"
fi
