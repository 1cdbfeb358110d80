#!/usr/bin/env bash
# Builds the program without any shared library, as target/static/snapback, and tries it in a root directory
# that holds nothing but it: an image is shown and verified, pushed to a repository in a directory and pulled
# again. Where rustup has the target of musl (`rustup target add x86_64-unknown-linux-musl`, and Debian's
# musl-tools for zstd) it is linked with that, else with glibc. docs/installing.md tells what it can't do.
# Root is asked for.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck disable=SC2034 # used by common.sh
me=static
# shellcheck source=scripts/common.sh
. "$here/common.sh"

cd "$here/.."
target=x86_64-unknown-linux-musl
if ! { [ -d "$(rustc --print sysroot)/lib/rustlib/$target" ] && command -v musl-gcc >/dev/null; }; then
    target=x86_64-unknown-linux-gnu
fi
# A target that is named keeps crt-static away from build scripts and procedural macros. The crate getrandom
# looks for glibc's function at run time, in vain where all is linked in, and would want /dev/urandom then.
RUSTFLAGS='-C target-feature=+crt-static --cfg getrandom_backend="linux_getrandom"' \
    cargo build --locked --release --bin snapback --target "$target" --target-dir target/static-build
mkdir -p target/static
install -m 755 "target/static-build/$target/release/snapback" target/static/snapback
program=target/static/snapback
told=$(ldd "$program" 2>&1 || true)
case $told in *"not a dynamic executable"* | *"statically linked"*) ;; *) die "it needs libraries: $told" ;; esac

root=$(mktemp -d)
trap 'as_root rm -rf "$root"' EXIT
mkdir "$root/work"
install -m 755 "$program" "$root/snapback"
install -m 644 tests/data/0.2.0.snap "$root/work/vm.snap"
# By its path: with an empty environment it is not looked for among the commands for root.
inside() { as_root env -i /usr/sbin/chroot "$root" /snapback "$@"; }
inside --version
inside info /work/vm.snap >/dev/null
inside verify /work/vm.snap
inside init --repo /work/repository
inside push /work/vm.snap --name web1 --no-disks --repo /work/repository
inside list --repo /work/repository | grep -q web1 || die "the snapshot is not in the list"
inside pull web1 /work/again.snap --repo /work/repository
as_root cmp "$root/work/vm.snap" "$root/work/again.snap" || die "what was pulled is another image"
say "$program, of $target: $(stat -c %s "$program") bytes"
