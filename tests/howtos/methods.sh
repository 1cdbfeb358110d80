# shellcheck shell=bash disable=SC2034 # sourced by scripts/howtos_inside.sh
page=docs/methods.md

guest /run/vm
snapback save --qmp /run/vm/qmp.sock vm.snap >/dev/null
end /run/vm

# Fewer runs than anybody should publish.
instead 'snapback bench * base.csv' 'snapback bench vm.snap --runs 2 --pin 0-1 --save base.json --csv base.csv'
instead 'snapback bench * new.csv' 'snapback bench vm.snap --runs 2 --pin 0-1 --save new.json --csv new.csv'
