#!/usr/bin/env bash
# Follows docs/tutorial.md to the letter in clean Debians, 12 and 13, which have nothing but apt: the package
# is that of `make deb`, and everything else is what the tutorial says.
#
#   tutorial_clean.sh               both
#   tutorial_clean.sh bookworm      one of them
#
# The Debians are installed into bare-NAME/ in the deps folder, once; the tutorial works on an overlay over
# it, in namespaces of its own. Root is asked for.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
deps=${SNAPBACK_DEPS:-$here/../.deps}
# shellcheck disable=SC2034 # used by common.sh
me=tutorial
# shellcheck source=scripts/common.sh
. "$here/common.sh"

command -v mmdebstrap >/dev/null || die "mmdebstrap is missing; run: make setup"
deps=$(cd "$deps" && pwd)
package=$(echo "$here"/../target/debian/snapback_*.deb)
[ -e "$package" ] || die "there is no package; run: make deb"
exec 9>"$deps/lock-clean"
flock 9

follow() {
    local name=$1 root=$deps/bare-$1 work uri
    uri=$(mirror)
    if [ ! -e "$root/etc/debian_version" ]; then
        say "installing Debian $name from $uri"
        as_root rm -rf "$root.new"
        as_root mmdebstrap --quiet --mode=root --variant=apt --aptopt='Acquire::Languages "none"' \
            --dpkgopt=force-unsafe-io "$name" "$root.new" "deb $uri $name main" ||
            die "can't install Debian $name from $uri"
        as_root mv "$root.new" "$root"
    fi
    work=$(as_root mktemp -d "$deps/bare-work.XXXXXX")
    # The trap runs with what `work` is now.
    # shellcheck disable=SC2064
    trap "as_root rm -rf '$work'" EXIT
    as_root mkdir -p "$work/upper/srv/scripts" "$work/upper/srv/docs" "$work/upper/etc/apt/apt.conf.d" \
        "$work/layer" "$work/root"
    as_root cp "$here/tutorial.sh" "$here/common.sh" "$work/upper/srv/scripts/"
    as_root cp "$here/../docs/tutorial.md" "$work/upper/srv/docs/"
    as_root cp "$package" "$work/upper/srv/"
    as_root cp /etc/resolv.conf "$work/upper/etc/"
    # This system's way to the mirror, and a yes to what apt asks.
    as_root cp -r /etc/apt/apt.conf.d "$work/upper/etc/apt/"
    echo 'APT::Get::Assume-Yes "true";' | as_root tee "$work/upper/etc/apt/apt.conf.d/99yes" >/dev/null
    say "Debian $name"
    # shellcheck disable=SC2016 # its own arguments
    as_root unshare --mount --pid --fork --kill-child sh -c '
        mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/layer" "$2/root" &&
            mount --bind /dev "$2/root/dev" && mount --bind /sys "$2/root/sys" &&
            mount -t proc proc "$2/root/proc" && mount -t tmpfs tmpfs "$2/root/run" &&
            exec chroot "$2/root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
                DEBIAN_FRONTEND=noninteractive \
                bash /srv/scripts/tutorial.sh installed /srv/"$3"' sh "$root" "$work" "${package##*/}" ||
        die "failed in Debian $name"
    as_root rm -rf "$work"
    trap - EXIT
}

for name in "${@:-bookworm}"; do follow "$name"; done
[ $# -gt 0 ] || follow trixie
