#!/usr/bin/env bash
# Builds the package `snapback` twice, from copies of the sources in two folders, and compares: both have
# to be the same, byte for byte. `make setup` comes first.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
deps=${SNAPBACK_DEPS:-$here/../.deps}
# shellcheck disable=SC2034 # used by common.sh
me=reproducible
# shellcheck source=scripts/common.sh
. "$here/common.sh"

mkdir -p "$deps"
deps=$(cd "$deps" && pwd)
export SNAPBACK_DEPS=$deps
cd "$here/.."
work=$(mktemp -d "$deps/reproducible.XXXXXX")
trap 'rm -rf "$work"' EXIT
for place in one a/much/longer/two; do
    mkdir -p "$work/$place"
    git clone --quiet --no-hardlinks . "$work/$place/snapback"
    # The one time that counts is that of the commit.
    find "$work/$place/snapback" -path '*/.git' -prune -o -type f -exec touch {} +
    (cd "$work/$place/snapback" && scripts/deb.sh program)
done
cd "$work"
sha256sum ./one/snapback/target/deb/snapback ./a/much/longer/two/snapback/target/deb/snapback
sha256sum ./one/snapback/target/debian/*.deb ./a/much/longer/two/snapback/target/debian/*.deb
cmp one/snapback/target/debian/*.deb a/much/longer/two/snapback/target/debian/*.deb ||
    die "two builds differ"
say "two builds in two folders are the same"
