#!/usr/bin/env bash
# Runs every command of docs/tutorial.md, in its order, in a directory of its own. Root is asked for, as the
# tutorial does. Tells how many commands come before the guest is back, and how long they take.
#
#   tutorial.sh PROGRAM         with that program, on this system's QEMU. The package is not installed
#   tutorial.sh PROGRAM newest  the same on QEMU 11.1 (scripts/newest.sh)
#   tutorial.sh installed FILE  to the letter, on a system that has nothing of it: the package is FILE. Its
#                               question whether to go on is answered with yes (scripts/tutorial_clean.sh)
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck disable=SC2034 # used by common.sh
me=tutorial
# shellcheck source=scripts/common.sh
. "$here/common.sh"

# The most commands from the package to the guest that is back.
most=8
program=${1:?"the program snapback"} how=${2:-}
if [ "$program" != installed ]; then
    program=$(readlink -f "$program")
    [ "$(id -u)" = 0 ] || exec sudo env PATH="$PATH" SNAPBACK_DEPS="${SNAPBACK_DEPS:-}" "$here/tutorial.sh" "$program" "$how"
fi

work=$(mktemp -d)
cd "$work"
# Whatever the tutorial has started and not ended works in this directory.
clean_up() {
    local process
    for process in /proc/[0-9]*; do
        if [ "$(readlink "$process/cwd")" = "$work" ] && [ "${process#/proc/}" != $$ ]; then
            kill "${process#/proc/}" 2>/dev/null || true
        fi
    done
    cd / && rm -rf "$work"
}
if [ "$program" = installed ]; then
    cp "$how" .
else
    snapback() { XDG_RUNTIME_DIR=$work "$program" "$@"; }
    # The mirror of this system; the reader has one by himself.
    mmdebstrap() { command mmdebstrap --quiet "$@" "deb $(mirror) $release main"; }
fi
if [ "$how" = newest ]; then
    newest=$(cd "${SNAPBACK_DEPS:-$here/../.deps}/qemu-11.1/usr" && pwd)
    qemu-system-x86_64() {
        "$newest/bin/qemu-system-x86_64" -L "$newest/share/qemu" -L "$newest/share/seabios" "$@"
    }
fi
# until_true SECONDS WHAT COMMAND... : waits for it.
until_true() {
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || die "waited for $what in vain: $(tail -n 5 console.log)"
        sleep 0.2
    done
}
last_tick() { sed -n 's/.*tick \([0-9]*\).*/\1/p' console.log | tail -n 1; }
ticks_beyond() { [ "$(last_tick)" -gt "$1" ]; }

# The commands are jobs, as in a shell that somebody types into.
set -m
trap clean_up EXIT
# shellcheck disable=SC2016 # backticks are Markdown's
mapfile -t commands < <(sed -n '/^```console$/,/^```$/s/^# //p' "$here/../docs/tutorial.md")
[ "${#commands[@]}" -gt 5 ] || die "docs/tutorial.md has no commands"
count=0 spent=0 back=
for command in "${commands[@]}"; do
    count=$((count + 1))
    case $program:$command in
    installed:*) ;;
    *:"apt "*) continue ;;
    esac
    say "$command"
    case $command in "kill "*) ending=$(cat guest.pid) ;; esac
    before=$(date +%s%N)
    eval "$command"
    spent=$((spent + ($(date +%s%N) - before) / 1000000))
    case $command in
    "kill "*) until_true 30 "the guest's end" test ! -d "/proc/$ending" ;;
    qemu-system-*) until_true 300 "the guest's count" ticks_beyond 3 ;;
    "snapback save "*) saved=$(last_tick) ;;
    "snapback revert "* | "snapback reset "*)
        until_true 120 "the count to go on" ticks_beyond "$saved"
        [ "$(grep -c 'tick 1[^0-9]*$' console.log)" = 1 ] || die "the guest began anew"
        [ -n "$back" ] || back=$count
        [ "$back" != "$count" ] || told="$count commands, $spent ms of them this program's and Debian's"
        ;;
    esac
done
say "the guest was back behind $told"
[ "$back" -le "$most" ] || die "that is more than $most"
