#!/usr/bin/env bash
# The part of deb_test.sh that runs inside of a clean Debian, as its root.
set -euo pipefail

cd /srv/test
say() { printf '    %s\n' "$*"; }
die() {
    printf 'deb-test: %s\n' "$*" >&2
    exit 1
}
# until_true SECONDS WHAT COMMAND... : waits for it.
until_true() {
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        if [ "$SECONDS" -ge "$end" ]; then
            tail -n 5 /run/snapback/*.log /run/vm*/console || true
            die "waited for $what in vain"
        fi
        sleep 0.2
    done
}
# What is on this system and belongs to no log of dpkg's.
files() {
    find / -xdev \( -path /srv/test -o -path /var/lib/dpkg -o -path /var/log -o -path /var/cache \
        -o -path /tmp -o -path /root -o -path /etc/ld.so.cache \) -prune -o -print | sort
}

files >/tmp/before
package=$(echo snapback_*.deb) libvirt=$(echo snapback-libvirt_*.deb)

say "installing the older package, changing its settings, upgrading"
dpkg -i older.deb >/tmp/dpkg.log 2>&1 || { cat /tmp/dpkg.log; die "it is not installed"; }
echo 'compress = "zstd:3"' >>/etc/snapback/config.toml
dpkg --force-confdef --force-confold -i "$package" >>/tmp/dpkg.log 2>&1 || {
    cat /tmp/dpkg.log
    die "it is not upgraded"
}
! dpkg -l snapback | grep -q 0.1.0 || die "it was not upgraded"
snapback config show | grep -q 'compress .*zstd:3 .*/etc/snapback/config.toml' ||
    die "the settings were lost: $(snapback config show)"
getent group snapback >/dev/null || die "there is no group snapback"

say "manual pages, completions, profile, units"
for page in $(dpkg -L snapback | grep -E '/man[157]/.*\.gz$'); do
    told=$(man --warnings -l -Tutf8 "$page" 2>&1 >/dev/null) || die "$page: $told"
    [ -z "$told" ] || die "$page: $told"
done
man 5 snapback-image | grep -qi superblock || die "snapback-image(5) says nothing"
completed=$(fish -c 'complete -C "snapback rev"')
[[ $completed == revert* ]] || die "fish completes: $completed"
completed=$(bash -c '. /usr/share/bash-completion/completions/snapback
    COMP_WORDS=(snapback work) COMP_CWORD=1 COMP_LINE="snapback work" COMP_POINT=13
    _snapback snapback work snapback; echo "${COMPREPLY[*]}"')
[[ $completed == working-set* ]] || die "bash completes: $completed"
# The kernel at hand may have no AppArmor: the parser alone tells whether the profile is one.
told=$(apparmor_parser --skip-kernel-load --skip-cache --warn=all /etc/apparmor.d/usr.bin.snapback 2>&1) ||
    die "the profile is wrong: $told"
units=(snapback.socket snapback.service snapback-pool@nightly.service
    snapback-backup.service snapback-backup.timer)
for unit in "${units[@]}"; do
    [ -e "/usr/lib/systemd/system/${unit/@nightly/@}" ] || die "the package has no $unit"
done
enabled=$(find /etc/systemd/system -name 'snapback*')
[ -z "$enabled" ] || die "units are enabled by installing: $enabled"
# It finds the program that the pool's unit asks with, too.
touch /usr/bin/curl && chmod 755 /usr/bin/curl
told=$(systemd-analyze verify --man=no "${units[@]}" 2>&1) || die "the units are wrong: $told"
rm /usr/bin/curl
told=$(grep snapback <<<"$told" || true)
[ -z "$told" ] || die "the units are wrong: $told"

say "a save and a revert, on $(qemu-system-x86_64 --version | head -n 1)"
mkdir /run/vm
# shellcheck disable=SC2054 # commas are QEMU's
guest=(qemu-system-x86_64 -accel tcg -M pc -m 256 -nodefaults -display none -no-user-config
    -kernel vmlinuz -initrd initramfs.cpio -append 'console=ttyS0 no_timer_check oracle.beat_ms=200'
    -serial file:/run/vm/console -serial null -qmp unix:/run/vm/qmp.sock,server=on,wait=off)
"${guest[@]}" &
original=$!
beats() { grep -c '^BEAT' "$1"; }
until_true 120 "the guest's heart" beats /run/vm/console
snapback check --qmp /run/vm/qmp.sock vm.snap >/dev/null || die "check refuses"
snapback save --qmp /run/vm/qmp.sock vm.snap
printf 'repository = "/srv/test/backups"\nspool = "/srv/test/spool"\n[machines.web1]\nqmp = "%s"\n' \
    /run/vm/qmp.sock >backup.toml
snapback init --repo /srv/test/backups
snapback backup --config backup.toml
[[ $(snapback list --repo /srv/test/backups) == *web1* ]] || die "there is no backup"
told=$(snapback backup 2>&1 || true)
[[ $told == *"names no machine"* ]] || die "of the file that the package brings it says: $told"
kill "$original" && wait "$original" || true
snapback verify vm.snap
mkdir /run/vm2
snapback revert vm.snap --path /run/vm=/run/vm2 --qmp /run/vm2/new.sock --resettable --detach
until_true 60 "the reverted guest's heart" beats /run/vm2/console
python3 qmp.py /run/vm2/new.sock query-status | grep -q '"running"' || die "the guest does not run"
snapback reset --qmp /run/vm2/new.sock
snapback stop "$(snapback ps | awk 'NR == 2 { print $1 }')"

say "a pool, by the daemon that the package configures"
snapback daemon --config /etc/snapback/pools.toml >/dev/null &
daemon=$!
until_true 30 "the daemon" test -S /run/snapback/daemon.sock
[ "$(stat -c %G:%a /run/snapback/daemon.sock)" = snapback:660 ] || die "the socket is not the group's"
snapback pool create booted /srv/test/vm.snap --armed 1 >/dev/null
taken=$(snapback take booted --name one)
echo "$taken"
snapback release one >/dev/null
snapback pool remove booted >/dev/null
kill "$daemon" && wait "$daemon" || true

say "with libvirt"
told=$(snapback check --domain x 2>&1 || true)
[[ $told == *"without libvirt"* ]] || die "without snapback-libvirt it says: $told"
dpkg -i "$libvirt" >>/tmp/dpkg.log 2>&1 || { cat /tmp/dpkg.log; die "$libvirt is not installed"; }
told=$(snapback check --domain x 2>&1 || true)
[[ $told != *"without libvirt"* ]] || die "with snapback-libvirt it says: $told"
[[ $(ldd /usr/lib/snapback/snapback) == *libvirt.so* ]] || die "it is not linked with libvirt"

say "removing, purging"
dpkg -r snapback-libvirt snapback >>/tmp/dpkg.log 2>&1 || { cat /tmp/dpkg.log; die "not removed"; }
[ ! -e /usr/bin/snapback ] || die "the program is still there"
grep -q zstd:3 /etc/snapback/config.toml || die "removal took the settings"
dpkg -P snapback-libvirt snapback >>/tmp/dpkg.log 2>&1 || { cat /tmp/dpkg.log; die "not purged"; }
rm -rf /run/vm /run/vm2
files >/tmp/after
# The group stays, since files may have its number.
left=$(comm -13 /tmp/before /tmp/after | grep -vE '^/etc/(group|gshadow|passwd|shadow|subgid|subuid)-?$' || true)
[ -z "$left" ] || die "purged, it has left: $left"
say "nothing is left"
