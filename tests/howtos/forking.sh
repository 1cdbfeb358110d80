# Sourced by scripts/howtos_inside.sh, which expands what is quoted.
# shellcheck shell=bash disable=SC2016,SC2034,SC2054
page=docs/forking.md

guest /run/vm

after 'snapback fork *' 'runs /run/vm/qmp.sock; runs /run/f3/qmp.sock'
