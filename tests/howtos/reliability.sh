# Sourced by scripts/howtos_inside.sh, which expands what is quoted.
# shellcheck shell=bash disable=SC2016,SC2034,SC2054
page=docs/reliability.md

guest /run/vm
snapback save --qmp /run/vm/qmp.sock vm.snap >/dev/null
end /run/vm
snapback revert vm.snap --fill-rate 1M --detach --qmp /run/vm/qmp.sock >/dev/null
# The server, its keeper and their broker at once, so that none starts another. Nobody else runs the program
# here.
for signal in STOP KILL; do
    for process in /proc/[0-9]*; do
        [ "$(program_of "$process")" = /usr/local/bin/snapback ] || continue
        kill -s "$signal" "${process#/proc/}"
    done
done
for process in /proc/[0-9]*; do
    case $(program_of "$process") in */qemu-system-*) left=${process#/proc/} ;; esac
done

instead 'snapback resume *' 'snapback resume vm.snap --pid "$left"'
after 'snapback resume *' 'runs /run/vm/qmp.sock'
