#!/usr/bin/env bash
# Checks, builds and tests the Python client (clients/python):
#
#   python.sh setup   by apt, as root: Python, curl, jq and systemd, where they are missing;
#                     a virtual environment, python/venv in the deps folder, with what
#                     scripts/python-tools.txt lists, pinned, from PyPI
#   python.sh check   formatting, lint, types (mypy --strict), and the oldest Python that the
#                     source runs on; shell scripts; the links of the documentation
#   python.sh wheel   builds python/snapback_client-*.whl in the deps folder, and installs it
#                     in the environment
#   python.sh test    all unit tests against that wheel; with SNAPBACK_SOCKET and
#                     SNAPBACK_TEST_POOL those against a daemon as well
#   python.sh         all of that, in this order
#
# Arguments behind `test` go to pytest. The deps folder is .deps in the project, or
# $SNAPBACK_DEPS. SNAPBACK_PYTHON names another Python than Debian's.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
client=$here/../clients/python
examples=$here/../examples
deps=${SNAPBACK_DEPS:-$here/../.deps}
# shellcheck disable=SC2034 # used by common.sh
me=python
. "$here/common.sh"

python=${SNAPBACK_PYTHON:-/usr/bin/python3}
mkdir -p "$deps/python"
deps=$(cd "$deps" && pwd)
venv=$deps/python/venv
# Nothing is written beside the sources.
export PYTHONDONTWRITEBYTECODE=1 RUFF_CACHE_DIR=$deps/python/ruff

# Debian's Python, what makes virtual environments with it, what examples/ci is made of, and what
# checks examples/systemd.
packages() {
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3 python3-venv
    local tool
    for tool in curl jq; do
        command -v "$tool" >/dev/null || echo "$tool"
    done
    command -v systemd-analyze >/dev/null || echo systemd
}

install_packages() {
    local missing
    missing=$(packages)
    [ -n "$missing" ] || return 0
    # shellcheck disable=SC2086 # one word a package
    set -- $missing
    command -v apt-get >/dev/null || die "missing, and there is no apt-get to install it: $*"
    say "installing: $*"
    as_root apt-get update -q
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -q --no-install-recommends "$@" </dev/null
}

# alone COMMAND... : runs it while nobody else does: two would write over each other.
alone() {
    exec 9>"$deps/python/lock"
    flock 9
    "$@"
    exec 9>&-
}

setup() {
    local made_of stamp=$venv/made-of
    install_packages
    made_of=$("$python" --version; cat "$here/python-tools.txt")
    if [ "$(cat "$stamp" 2>/dev/null)" != "$made_of" ]; then
        say "making $venv"
        rm -rf "$venv"
        "$python" -m venv "$venv"
        "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/python-tools.txt"
        echo "$made_of" >"$stamp"
    fi
}

check() {
    # All of it is Python of one style, wherever it lies.
    local ruff=("$venv/bin/ruff" --config "$client/pyproject.toml" --quiet)
    local sources=("$client" "$examples" "$here")
    cd "$client"
    "${ruff[@]}" format --check "${sources[@]}" || die "format it by: ${ruff[*]} format ${sources[*]}"
    "${ruff[@]}" check "${sources[@]}"
    "$venv/bin/mypy" --cache-dir "$deps/python/mypy"
    "$venv/bin/vermin" --quiet --no-tips --target=3.9- src
    PYTHONPATH=$client/src "$venv/bin/python" "$here/check_examples.py" "$examples"
    (cd "$here/.." && "$venv/bin/shellcheck" -x -P SCRIPTDIR examples/*/*.sh packaging/deb*/* \
        scripts/{python,deb,deb_inside,deb_test,docs,howtos,howtos_inside,minimum,newest,package,reproducible,s3s,static,stores,tutorial,tutorial_clean}.sh \
        tests/howtos/*.sh)
    "$here/docs.sh" links
}

wheel() {
    local tree
    # Built from a copy, with the licences in it: setuptools writes beside what it builds.
    tree=$(mktemp -d "$deps/python/build.XXXXXX")
    cp -r "$client/pyproject.toml" "$client/README.md" "$client/src" "$here"/../LICENSE-* "$tree"
    rm -f "$deps"/python/*.whl
    "$venv/bin/python" -m build --quiet --wheel --no-isolation --outdir "$deps/python" "$tree"
    rm -rf "$tree"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --force-reinstall \
        "$deps"/python/snapback_client-*.whl
    say "built $(echo "$deps"/python/snapback_client-*.whl)"
}

run_tests() {
    cd "$client"
    "$venv/bin/python" -m pytest -o cache_dir="$deps/python/pytest" "$@"
}

case ${1:-all} in
setup | check | wheel | test | all) alone setup ;;
*) die "knows setup, check, wheel and test, and no $1" ;;
esac
case ${1:-all} in
check) check ;;
wheel) alone wheel ;;
test)
    shift
    alone wheel
    run_tests "$@"
    ;;
all)
    check
    alone wheel
    run_tests
    ;;
esac
