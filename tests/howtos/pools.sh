# Sourced by scripts/howtos_inside.sh, which expands what is quoted.
# shellcheck shell=bash disable=SC2016,SC2034,SC2054
page=docs/pools.md

# The channel of an agent that is not there: what it is told fails, and the pool's guests run.
guest /run/vm -netdev user,id=net0 -device virtio-net-pci,netdev=net0 \
    -device virtio-serial -chardev socket,id=agent,path=/run/vm/agent.sock,server=on,wait=off \
    -device virtserialport,chardev=agent,name=org.qemu.guest_agent.0
snapback save --qmp /run/vm/qmp.sock vm.snap >/dev/null
end /run/vm
taken() {
    curl -s --unix-socket /run/snapback/daemon.sock http://x/v1/guests |
        python3 -c 'import json, sys; print(json.load(sys.stdin)[0]["id"])'
}
removed() { snapback pool remove booted >/dev/null; }

after 'snapback daemon &' 'until_true 30 "the daemon" snapback pool list'
instead 'snapback reset *' 'snapback reset "$(taken)"'
instead 'snapback release *' 'snapback release "$(taken)"'
before 'snapback pool create * --netdev *' removed
before 'snapback pool create * --agent-exec *' removed
after 'curl *' 'snapback release "$(taken)"'
