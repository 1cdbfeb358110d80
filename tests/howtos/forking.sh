# shellcheck shell=bash disable=SC2034 # sourced by scripts/howtos_inside.sh
page=docs/forking.md

guest /run/vm

after 'snapback fork *' 'runs /run/vm/qmp.sock; runs /run/f3/qmp.sock'
