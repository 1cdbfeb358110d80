# Sourced by scripts/howtos_inside.sh, which expands what is quoted.
# shellcheck shell=bash disable=SC2016,SC2034,SC2054
page=docs/saving.md

mkdir /vm
truncate -s 64M /vm/a.raw
qemu-img create -q -f qcow2 /vm/d.qcow2 64M
guest /run/vm -drive file=/vm/a.raw,format=raw,if=virtio,id=sys -drive file=/vm/d.qcow2,format=qcow2,if=virtio,id=d

after 'snapback save --qmp /run/vm/qmp.sock vm.snap' 'runs /run/vm/qmp.sock'
before 'snapback save * --resettable *' 'rm vm.snap'
after 'snapback reset *' 'runs /run/vm/qmp.sock'
