# shellcheck shell=bash disable=SC2034 # sourced by scripts/howtos_inside.sh
page=docs/consistency.md

mkdir /vm /clone /run/clone
qemu-img create -q -f qcow2 /vm/root.qcow2 64M
guest /run/vm -drive file=/vm/root.qcow2,format=qcow2,if=virtio,id=root
snapback save --qmp /run/vm/qmp.sock vm.snap >/dev/null

after 'snapback revert *' 'runs /run/clone/qmp.sock'
