# Sourced by scripts/howtos_inside.sh, which expands what is quoted.
# shellcheck shell=bash disable=SC2016,SC2034,SC2054
page=docs/how-to.md

mkdir -p /var/lib/vm /backup
truncate -s 64M /var/lib/vm/disk.raw
disk=(-drive file=/var/lib/vm/disk.raw,format=raw,if=virtio,id=disk0)
guest /run/vm "${disk[@]}"
snapback save --qmp /run/vm/qmp.sock nightly.snap >/dev/null

before 'snapback revert *' 'end /run/vm'
after 'snapback revert *' 'runs /run/vm/qmp.sock'
before 'snapback take *' 'end_all; CI_JOB_ID=17; daemon nightly.snap'
before 'snapback save * hung.snap' 'guest /run/vm'
after 'snapback export * --to elf *' 'readelf --headers hung.core | grep -q "CORE (Core file)"'
skip 'crash *' "the kernel's debug information is a gigabyte"
