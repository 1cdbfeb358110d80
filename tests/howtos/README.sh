# Sourced by scripts/howtos_inside.sh, which expands what is quoted.
# shellcheck shell=bash disable=SC2016,SC2034,SC2054
page=README.md

cards=(-netdev tap,id=net0,ifname=tap0,script=no,downscript=no -device virtio-net-pci,netdev=net0
    -netdev user,id=net1,hostfwd=tcp:127.0.0.1:2222-:22 -device virtio-net-pci,netdev=net1)
guest /run/vm "${cards[@]}"

before 'snapback revert vm.snap --qmp /run/vm/new-qmp.sock' 'end /run/vm'
after 'snapback revert vm.snap --qmp /run/vm/new-qmp.sock' 'runs /run/vm/new-qmp.sock'
before 'snapback revert * --netdev net0=tap,*' 'mkdir /run/vm2'
after 'snapback revert * --netdev net0=tap,*' 'runs /run/vm2/qmp.sock'
before 'snapback fork *' 'end_all; guest /run/vm "${cards[@]:4}"'
before 'snapback revert * --resettable *' end_all
before 'snapback daemon &' end_all
after 'snapback daemon &' 'until_true 30 "the daemon" snapback pool list'
before 'snapback save * --parent *' 'end_all; guest /run/vm "${cards[@]}"'
