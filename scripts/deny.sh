#!/usr/bin/env bash
# Checks the licences, the sources and the advisories of all crates that snapback is built of
# (deny.toml). cargo-deny is built once, into the deps folder.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
deps=${SNAPBACK_DEPS:-$here/../.deps}
# shellcheck disable=SC2034 # used by common.sh
me=deny
. "$here/common.sh"

version=0.20.2
mkdir -p "$deps"
deps=$(cd "$deps" && pwd)
deny=$deps/cargo-deny-$version/bin/cargo-deny
if [ ! -x "$deny" ]; then
    say "building cargo-deny $version, which takes some minutes"
    cargo install cargo-deny --version "$version" --locked --quiet \
        --root "$deps/cargo-deny-$version" --target-dir "$deps/cargo-deny-target"
    rm -rf "$deps/cargo-deny-target"
fi

cd "$here/.."
"$deny" --locked check licenses bans sources

# The database of advisories is a repository of its own, which not every machine can reach.
if "$deny" --locked fetch db >/dev/null 2>&1; then
    "$deny" --locked check --disable-fetch advisories
else
    say "advisories were NOT checked: their database can't be reached"
fi
