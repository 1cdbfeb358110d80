#!/usr/bin/env bash
# The part of howtos.sh that runs one page, `howtos_inside.sh SCENE`, in a system of its own, as its root.
set -Eeuo pipefail

project=$(cd "$(dirname "$0")/.." && pwd)
scene=$1
say() { printf 'howtos: %s\n' "$*"; }
die() {
    say "$scene: $*" >&2
    tail -n 5 /run/vm*/console >&2 2>/dev/null || true
    exit 1
}
trap 'say "$scene: failed: $BASH_COMMAND" >&2' ERR
# until_true SECONDS WHAT COMMAND... : waits for it.
until_true() {
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || die "waited for $what in vain"
        sleep 0.1
    done
}

# --- what scenes are made of ---------------------------------------------------

# The page, and of the commands, in the order of the rules: a pattern of the shell's, and what to do.
page='' patterns=() kinds=() texts=() used=()
rule() {
    kinds+=("$1") patterns+=("$2") texts+=("$3") used+=('')
}
before() { rule before "$@"; }
after() { rule after "$@"; }
# What stands in the place of the command, where a reader has to fill something in.
instead() { rule instead "$@"; }
skip() { rule skip "$@"; }

# guest DIRECTORY [ARGUMENTS OF QEMU...] : starts a guest whose control socket and console are there, and
# waits until it lives.
guest() {
    local directory=$1
    shift
    mkdir -p "$directory"
    rm -f "$directory/console"
    # shellcheck disable=SC2054 # commas are QEMU's
    qemu-system-x86_64 -accel tcg -M pc -m 192 -nodefaults -display none -no-user-config \
        -kernel "$DEPS/vmlinuz" -initrd "$DEPS/initramfs.cpio" \
        -append 'console=ttyS0 no_timer_check oracle.fill_mib=32 oracle.beat_ms=100' \
        -serial "file:$directory/console" -serial null -qmp "unix:$directory/qmp.sock,server=on,wait=off" \
        -pidfile "$directory/pid" "$@" &
    until_true 120 "the guest of $directory" lives "$directory/console"
}
lives() { [ "$(grep -c '^BEAT' "$1")" -ge 3 ]; }
# end DIRECTORY : ends the guest that was started there.
end() {
    local pid
    pid=$(cat "$1/pid")
    kill "$pid"
    until_true 30 "the guest's end" test ! -d "/proc/$pid"
}
# program_of /proc/PID : its program; nothing if it has ended, or has none.
program_of() { readlink "$1/exe" || true; }
# end_all : ends all guests, with those who serve them.
end_all() {
    local process
    for process in /proc/[0-9]*; do
        case $(program_of "$process") in */qemu-system-*) kill "${process#/proc/}" 2>/dev/null || true ;; esac
    done
    until_true 60 "the end of all guests" no_guest
}
no_guest() {
    local process
    for process in /proc/[0-9]*; do
        case $(program_of "$process") in */qemu-system-*) return 1 ;; esac
    done
}
# status SOCKET : what the guest is doing.
status() { python3 "$project/scripts/qmp.py" "$1" query-status; }
runs() { status "$1" | grep -q '"running"'; }
# daemon : starts a daemon with a pool `booted` of vm.snap.
daemon() {
    snapback daemon >/run/daemon.log 2>&1 &
    until_true 30 "the daemon" snapback pool list
    snapback pool create booted "${1:-vm.snap}" --armed 1 >/dev/null
}

# --- the page ------------------------------------------------------------------

mkdir -p /work-of-howtos && cd /work-of-howtos
# shellcheck source=/dev/null
. "$project/tests/howtos/$scene.sh"
[ -e "$project/$page" ] || die "there is no page $page"
# Blocks of commands: lines behind `$` or `#`, and those that go on behind a backslash.
mapfile -t commands < <(awk '
    /^ *```/ { inside = !inside; next }
    inside && open { sub(/^ +/, ""); line = line " " $0; open = sub(/\\$/, "", line); if (!open) print line; next }
    inside && /^ *[$#] [a-z]/ { line = $0; sub(/^ *[$#] /, "", line); open = sub(/\\$/, "", line); if (!open) print line }
' "$project/$page")
[ "${#commands[@]}" -gt 0 ] || die "$page has no commands"

set -m
ran=0 skipped=0
for command in "${commands[@]}"; do
    # What a reader is told behind it.
    command=${command%%  *# *}
    command=${command%% # *}
    does=$command why='' behind=()
    for number in "${!patterns[@]}"; do
        # shellcheck disable=SC2053 # a pattern
        [[ $command == ${patterns[number]} ]] || continue
        used[number]=yes
        case ${kinds[number]} in
        before) eval "${texts[number]}" ;;
        after) behind+=("${texts[number]}") ;;
        instead) does=${texts[number]} ;;
        skip) why=${texts[number]} ;;
        esac
    done
    if [ -n "$why" ]; then
        say "$page: NOT RUN ($why): $command"
        skipped=$((skipped + 1))
        continue
    fi
    say "$page: $does"
    eval "$does"
    for then in ${behind+"${behind[@]}"}; do eval "$then"; done
    ran=$((ran + 1))
done
for number in "${!patterns[@]}"; do
    [ -n "${used[number]}" ] || die "no command of $page is like ${patterns[number]}"
done
say "$page: $ran commands run, $skipped not"
