# Sourced by scripts/howtos_inside.sh, which expands what is quoted.
# shellcheck shell=bash disable=SC2016,SC2034,SC2054
page=docs/reverting.md

guest /run/vm -netdev user,id=net0 -device virtio-net-pci,netdev=net0 \
    -netdev user,id=net1,hostfwd=tcp:127.0.0.1:2222-:22 -device virtio-net-pci,netdev=net1
snapback save --qmp /run/vm/qmp.sock vm.snap >/dev/null
end /run/vm

clones_run() {
    local number
    for number in $(seq "$1"); do
        runs "$2$number/qmp.sock" || die "clone $number does not run"
    done
    end_all
}
after 'snapback revert vm.snap --count 16 *' 'clones_run 16 /srv/vms/w'
after 'snapback revert * --port *' 'clones_run 4 vm-'
skip 'snapback revert * --agent-set-time *' "needs a guest with systemd and the agent"
before 'snapback save * --followable *' 'end_all; rm vm.snap; guest /run/vm; mkdir /run/vm2'
after 'snapback revert * --follow *' 'runs /run/vm/qmp.sock; runs /run/vm2/qmp.sock; end_all; rm -r /run/vm2'
after 'snapback reset *' 'runs /run/vm/qmp.sock'
