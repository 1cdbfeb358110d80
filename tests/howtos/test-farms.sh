# Sourced by scripts/howtos_inside.sh, which expands what is quoted.
# shellcheck shell=bash disable=SC2016,SC2034,SC2054
page=docs/test-farms.md

mkdir /images /vm
qemu-img create -q -f qcow2 /vm/overlay.qcow2 64M
guest / -drive file=/vm/overlay.qcow2,format=qcow2,if=virtio \
    -netdev user,id=p00,hostfwd=tcp:127.0.0.1:2022-:22 -device virtio-net-pci,netdev=p00

after 'snapback reset *' 'runs /qmp.sock'
after 'snapback revert *' 'runs /run/r1/qmp.sock; runs /run/r2/qmp.sock'
