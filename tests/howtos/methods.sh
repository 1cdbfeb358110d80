# Sourced by scripts/howtos_inside.sh, which expands what is quoted.
# shellcheck shell=bash disable=SC2016,SC2034,SC2054
page=docs/methods.md

guest /run/vm
snapback save --qmp /run/vm/qmp.sock vm.snap >/dev/null
end /run/vm

# Fewer runs than anybody should publish.
instead 'snapback bench * base.csv' 'snapback bench vm.snap --runs 2 --pin 0-1 --save base.json --csv base.csv'
instead 'snapback bench * new.csv' 'snapback bench vm.snap --runs 2 --pin 0-1 --save new.json --csv new.csv'
