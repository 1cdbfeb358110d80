# Sourced by scripts/howtos_inside.sh, which expands what is quoted.
# shellcheck shell=bash disable=SC2016,SC2034,SC2054
page=docs/exchange.md

guest /run/vm
tr '\0' '\n' <"/proc/$(cat /run/vm/pid)/cmdline" | sed "s/'/'\\\\''/g; s/.*/'&'/" | tr '\n' ' ' >vm.sh
snapback save --qmp /run/vm/qmp.sock vm.snap >/dev/null
end /run/vm
# ARGS of the page.
args() { sed "s/^'[^']*' //" vm.sh; }

instead 'qemu-system-x86_64 ARGS*' 'eval "qemu-system-x86_64 $(args) -incoming \"exec:cat vm.stream\" &"'
after 'qemu-system-x86_64 ARGS*' 'until_true 60 "the guest of the stream" runs /run/vm/qmp.sock; end_all'
instead 'snapback import * ARGS*' 'eval "snapback import vm.stream imported.snap -- qemu-system-x86_64 $(args)"'
before 'zstd -dc *' 'zstd -q vm.stream; rm vm.snap'
after 'snapback revert *' 'runs /run/vm/qmp.sock'
