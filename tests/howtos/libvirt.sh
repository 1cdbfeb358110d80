# Sourced by scripts/howtos_inside.sh, which expands what is quoted.
# shellcheck shell=bash disable=SC2016,SC2034,SC2054
page=docs/libvirt.md

mkdir -p /etc/libvirt /run/libvirt /var/lib/snap /var/lib/vm
for daemon in libvirtd virtlogd; do : >"/etc/libvirt/$daemon.conf"; done
printf 'user = "root"\ngroup = "root"\nclear_emulator_capabilities = 0\nremember_owner = 0\n' >/etc/libvirt/qemu.conf
virtlogd >/run/virtlogd.log 2>&1 &
libvirtd >/run/libvirtd.log 2>&1 &
export LIBVIRT_DEFAULT_URI=qemu:///system
until_true 60 libvirtd virsh list
qemu-img create -q -f qcow2 /var/lib/vm/disk.qcow2 64M
cat >web.xml <<XML
<domain type='qemu'>
  <name>web</name>
  <memory unit='MiB'>192</memory>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>$DEPS/vmlinuz</kernel>
    <initrd>$DEPS/initramfs.cpio</initrd>
    <cmdline>console=ttyS0 no_timer_check oracle.fill_mib=32 oracle.beat_ms=100</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/var/lib/vm/disk.qcow2'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <serial type='file'><source path='/run/console'/></serial>
    <serial type='null'/>
  </devices>
</domain>
XML
virsh --quiet define web.xml
virsh --quiet start web
until_true 120 "the domain" lives /run/console
is_running() { [ "$(virsh domstate web | head -n 1)" = running ]; }

after 'snapback save *' is_running
after 'snapback revert *' is_running
