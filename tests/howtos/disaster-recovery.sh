# Sourced by scripts/howtos_inside.sh, which expands what is quoted.
# shellcheck shell=bash disable=SC2016,SC2034,SC2054
page=docs/disaster-recovery.md

# The object store, and what its tools take from the environment.
mkdir -p /srv/s3/backups
RUST_LOG=error "$DEPS/s3s-fs/bin/s3s-fs" --host 127.0.0.1 --port 8014 \
    --access-key key --secret-key secret /srv/s3 >/run/s3.log 2>&1 &
export AWS_ENDPOINT=http://127.0.0.1:8014 AWS_ACCESS_KEY_ID=key AWS_SECRET_ACCESS_KEY=secret
export AWS_ALLOW_HTTP=true AWS_REGION=us-east-1
mkdir -p /var/lib/vm /var/lib/snapback /var/lib/guests /etc/snapback
qemu-img create -q -f qcow2 /var/lib/vm/disk.qcow2 64M
guest /run/vm -drive file=/var/lib/vm/disk.qcow2,format=qcow2,if=virtio
recipient() { age-keygen -y "$1"; }

before 'snapback init --encrypt-to *' 'age-keygen -o /run/recovery 2>/dev/null'
instead 'snapback init --encrypt-to *' 'snapback init --encrypt-to "$(recipient /etc/snapback/identity)" \
    --encrypt-to "$(recipient /run/recovery)" --identity /etc/snapback/identity'
# From here on, on the other host: nothing of the guest is left.
before 'snapback list' 'export SNAPBACK_IDENTITY=/etc/snapback/identity'
before 'snapback pull *' 'end /run/vm; mv /var/lib/vm /var/lib/lost; mv /var/lib/snapback /var/lib/lost-too'
instead 'snapback pull *' 'snapback pull web1@latest /srv/web1.snap | tee /run/pulled'
instead 'snapback revert /srv/*' 'snapback revert /srv/web1.snap --qmp /run/vm/new.sock \
    $(grep ^--path /run/pulled)'
after 'snapback revert /srv/*' 'runs /run/vm/new.sock; end_all'
instead 'snapback diff *' 'snapback diff "web1@$(date -u +%Y-%m-%d)" web1@latest'
instead 'snapback init --repo *' 'snapback init --repo s3://backups/signed \
    --encrypt-to "$(recipient "$SNAPBACK_IDENTITY")"'
after 'snapback copy * --sign-key *' 'test "$(snapback list --json --repo s3://backups/signed \
    --trust-key /etc/snapback/sign.pub | wc -l)" -ge 1
    if snapback list --trust-key /etc/snapback/sign.pub; then die "what is not signed was listed"; fi'
before 'snapback backup --check-config' 'mkdir -p /var/lib/vm /var/lib/snapback
    qemu-img create -q -f qcow2 /var/lib/vm/disk.qcow2 64M
    guest /run/vm -drive file=/var/lib/vm/disk.qcow2,format=qcow2,if=virtio
    printf "repository = \"%s\"\nidentity = [\"%s\"]\n[machines.web1]\nqmp = \"/run/vm/qmp.sock\"\n" \
        "$SNAPBACK_REPOSITORY" "$SNAPBACK_IDENTITY" >/etc/snapback/backup.toml'
after 'snapback backup web1' end_all
skip 'systemctl *' "no systemd runs here"
skip 'snapback push * --netdev *' "needs a guest with a card on a bridge"
after 'snapback revert s3:*' 'runs /run/web1.sock; end_all'
