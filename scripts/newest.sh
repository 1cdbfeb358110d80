#!/usr/bin/env bash
# Unpacks QEMU 11.1 of Debian's trixie-backports into qemu-11.1/ in the deps folder, with all of Debian 13
# that it needs beside: its C library is newer than Debian 12's. `make setup` comes first.
#
# The programs are made to take the loader and the libraries that lie beside them, so that they run in
# place, without a chroot: /proc/PID/exe is QEMU, as for any other. They find their firmware and modules by
# where they lie.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
deps=${SNAPBACK_DEPS:-$here/../.deps}
# shellcheck disable=SC2034 # used by common.sh
me=newest
# shellcheck source=scripts/common.sh
. "$here/common.sh"

version=11.1 suite=trixie
mkdir -p "$deps/stamps"
deps=$(cd "$deps" && pwd)
folder=$deps/qemu-$version
stamp=$deps/stamps/qemu-$version-v1
exec 9>"$deps/lock-newest"
flock 9
[ ! -e "$stamp" ] || exit 0

command -v patchelf >/dev/null || {
    as_root apt-get update -q
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends patchelf </dev/null
}

# A private apt, which knows of no package that is installed: so it fetches everything.
work=$(mktemp -d "$deps/newest.XXXXXX")
trap 'rm -rf "$work"' EXIT
uri=$(mirror)
options="[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] "
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
: >"$work/status"
printf "deb $options%s %s main\n" "$uri" "$suite" "$uri" "$suite-backports" >"$work/sources.list"
private_apt() {
    apt-get -qq -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::State::Lists="$work/lists" -o Dir::State::Status="$work/status" -o Dir::Cache="$work/cache" \
        -o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
        -o APT::Architectures=amd64 -o APT::Sandbox::User=root "$@"
}
say "unpacking QEMU $version of $suite-backports"
private_apt update || die "can't read the package lists of $uri"
private_apt --yes --no-install-recommends --download-only -t "$suite-backports" \
    install qemu-system-x86 qemu-system-arm ipxe-qemu || die "can't download QEMU $version"
for archive in "$work"/cache/archives/*.deb; do
    dpkg -x "$archive" "$work/root"
done
rm -rf "$folder" "$work"/root/usr/share/{doc,locale,man}
mkdir "$folder"
mv "$work/root/usr" "$folder/"

libraries=usr/lib/x86_64-linux-gnu
for arch in x86_64 aarch64; do
    program=$folder/usr/bin/qemu-system-$arch
    # DT_RPATH, which counts for the libraries' own libraries and for modules as well.
    patchelf --set-interpreter "$folder/$libraries/ld-linux-x86-64.so.2" \
        --force-rpath --set-rpath "$folder/$libraries" "$program"
    case $("$program" --version | head -n 1) in
    *" $version."*) ;;
    *) die "$program does not run as QEMU $version" ;;
    esac
done
touch "$stamp"
say "$("$folder/usr/bin/qemu-system-x86_64" --version | head -n 1)"
