#!/usr/bin/env bash
# Runs the command lines of the documentation, on real guests: `howtos.sh PROGRAM [PAGE...]`. Each page has
# a scene in tests/howtos (README.md there), which says what has to be there before a command, what a
# placeholder stands for, and what isn't run and why. The tutorial has a script of its own.
#
# A page runs in an overlay over this system, in namespaces of its own: what it writes, starts and listens
# on goes with them. Root is asked for. `make guest` comes first.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
deps=${SNAPBACK_DEPS:-$here/../.deps}
# shellcheck disable=SC2034 # used by common.sh
me=howtos
# shellcheck source=scripts/common.sh
. "$here/common.sh"

program=$(readlink -f "${1:?"the program snapback"}")
shift
deps=$(cd "$deps" && pwd)
project=$(cd "$here/.." && pwd)
[ -e "$deps/initramfs.cpio" ] || die "there is no guest; run: make guest"
command -v age-keygen >/dev/null || {
    as_root apt-get update -q
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends age </dev/null
}

work=$(as_root mktemp -d "$deps/howtos.XXXXXX")
trap 'as_root rm -rf "$work"' EXIT

# run SCENE : in a system of its own.
run() {
    local place=$work/$1
    as_root mkdir -p "$place/upper" "$place/layer" "$place/root"
    # shellcheck disable=SC2016 # its own arguments
    as_root unshare --mount --pid --net --uts --fork --kill-child sh -c '
        set -e
        mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/layer" "$1/root"
        cd "$1/root"
        mount --rbind /dev dev && mount --rbind /sys sys && mount -t proc proc proc
        for place in run tmp srv mnt; do mount -t tmpfs tmpfs "$place"; done
        # Whatever file systems these lie on.
        for place in "$2" "$3"; do mount --rbind "$place" ".$place"; done
        install -m 755 "$4" usr/local/bin/snapback
        ip link set lo up
        exec chroot . env -i PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
            DEPS="$3" bash "$2/scripts/howtos_inside.sh" "$5"' \
        sh "$place" "$project" "$deps" "$program" "$1" || die "$1 failed"
    as_root rm -rf "$place"
}

# Commands of these are run elsewhere (tests/howtos/README.md).
elsewhere="docs/commands.md docs/installing.md docs/python.md docs/tutorial.md"
if [ $# = 0 ]; then
    cd "$project"
    # shellcheck disable=SC2013 # no page has a blank in its name
    for page in $(grep -lE '^ *[$#] snapback ' README.md docs/*.md); do
        case " $elsewhere " in *" $page "*) continue ;; esac
        grep -qx "page=$page" tests/howtos/*.sh || die "$page has commands and no scene in tests/howtos"
    done
    set -- tests/howtos/*.sh
fi
for scene in "$@"; do
    scene=${scene##*/}
    run "${scene%.sh}"
done
