# Sourced by scripts/howtos_inside.sh, which expands what is quoted.
# shellcheck shell=bash disable=SC2016,SC2034,SC2054
page=docs/consistency.md

mkdir /vm /clone /run/clone
qemu-img create -q -f qcow2 /vm/root.qcow2 64M
guest /run/vm -drive file=/vm/root.qcow2,format=qcow2,if=virtio,id=root
snapback save --qmp /run/vm/qmp.sock vm.snap >/dev/null

after 'snapback revert *' 'runs /run/clone/qmp.sock'
