#!/usr/bin/env bash
# Runs a command once for each kind of store beside directories and S3, with a server of that kind started on
# the loopback and SNAPBACK_TEST_STORE naming a repository there that is not made yet
# (tests/e2e/stores.rs):
#
#   WebDAV   rclone, which minds no conditions, with a password; Apache, which lists no more than a folder at
#            once
#   Azure    Azurite
#
# They are unpacked in stores/ in the deps folder, once: from Debian's packages and npm. `make guest` comes first.
# Names behind `--only`, separated by commas, choose among rclone, apache and azurite. Of Google's store there is
# no emulator known here that takes objects by the XML API, by which the library puts them
# (fake-gcs-server does not).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
deps=${SNAPBACK_DEPS:-$here/../.deps}
# shellcheck disable=SC2034 # used by common.sh
me=stores
# shellcheck source=scripts/common.sh
. "$here/common.sh"

only=rclone,apache,azurite
if [ "${1:-}" = --only ]; then
    only=$2
    shift 2
fi
[ $# -gt 0 ] || die "which command is to be run?"
wanted() { [[ ,$only, == *,$1,* ]]; }

mkdir -p "$deps/stores"
deps=$(cd "$deps" && pwd)
stores=$deps/stores
exec 9>"$stores/lock"
flock 9

# install NAME COMMAND...: has the command fill stores/NAME, unless that is there. Its working directory is gone
# afterwards.
install() {
    local name=$1 new
    shift
    [ ! -e "$stores/$name" ] || return 0
    say "unpacking $name"
    new=$(mktemp -d "$stores/new.XXXXXX")
    if ! (cd "$new" && mkdir root && "$@" && mv root "$stores/$name"); then
        rm -rf "$new"
        die "can't unpack $name"
    fi
    rm -rf "$new"
}
# unpack PACKAGE...: Debian's packages into root/. What else they need every Debian has.
unpack() {
    local archive
    apt-get -qq -o APT::Sandbox::User=root download "$@" 2>/dev/null || {
        # Its lists may be old, or missing.
        as_root apt-get update -q
        apt-get -qq -o APT::Sandbox::User=root download "$@" || return
    }
    for archive in *.deb; do
        dpkg -x "$archive" root || return
    done
}
from_npm() {
    command -v npm >/dev/null || {
        as_root apt-get update -q
        as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y -q --no-install-recommends nodejs npm </dev/null
    }
    npm install --silent --no-fund --no-audit --ignore-scripts --prefix root "$@" </dev/null
}
if wanted rclone; then install rclone unpack rclone; fi
if wanted apache; then install apache-2.4 unpack apache2-bin libapr1 libaprutil1; fi
if wanted azurite; then install azurite-3.34.0 from_npm azurite@3.34.0; fi

work=$(mktemp -d "${TMPDIR:-/tmp}/snapback-stores.XXXXXX")
server=
stop() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    [ -z "$server" ] || wait "$server" 2>/dev/null || true
    server=
}
trap 'stop; rm -rf "$work"' EXIT

free_port() {
    /usr/bin/python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
# serve COMMAND...: starts a server on $port, and waits until it listens there.
serve() {
    "$@" >"$work/log" 2>&1 9>&- &
    server=$!
    for _ in {1..300}; do
        if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then return; fi
        kill -0 "$server" 2>/dev/null || break
        sleep 0.1
    done
    cat "$work/log" >&2
    die "no server listens on port $port: $*"
}
# round NAME ADDRESS CONDITIONAL COMMAND...: a round in a store, which does or does not mind conditions.
round() {
    local name=$1 address=$2 conditional=$3
    shift 3
    say "a round in $name: $address"
    SNAPBACK_TEST_STORE=$address SNAPBACK_TEST_STORE_CONDITIONAL=$conditional "$@" || {
        tail -n 50 "$work/log" >&2
        die "$name failed"
    }
    stop
}

if wanted rclone; then
    port=$(free_port)
    mkdir "$work/rclone"
    serve "$stores/rclone/usr/bin/rclone" serve webdav "$work/rclone" --addr "127.0.0.1:$port" \
        --config /dev/null --user snapback --pass not-a-secret
    echo "machine 127.0.0.1 login snapback password not-a-secret" >"$work/netrc"
    NETRC=$work/netrc round rclone "http://127.0.0.1:$port/back/ups" false "$@"
fi

if wanted apache; then
    port=$(free_port)
    modules=$stores/apache-2.4/usr/lib/apache2/modules
    mkdir "$work/apache" "$work/run"
    {
        printf '%s\n' "ServerRoot $work/run" "ServerName localhost" "Listen 127.0.0.1:$port" \
            "PidFile $work/run/pid" "ErrorLog $work/log" "Mutex file:$work/run" "DefaultRuntimeDir $work/run"
        for module in mpm_event authz_core dav dav_fs; do
            echo "LoadModule ${module}_module $modules/mod_$module.so"
        done
        if [ "$(id -u)" = 0 ]; then
            printf '%s\n' "User www-data" "Group www-data"
            chown www-data "$work/apache" "$work/run"
            chmod 711 "$work"
        fi
        printf '%s\n' "DavLockDB $work/run/locks" "DocumentRoot $work/apache" "<Directory $work/apache>" \
            "Dav On" "Require all granted" "</Directory>"
    } >"$work/apache.conf"
    serve env LD_LIBRARY_PATH="$stores/apache-2.4/usr/lib/x86_64-linux-gnu" \
        "$stores/apache-2.4/usr/sbin/apache2" -f "$work/apache.conf" -D FOREGROUND
    round Apache "http://127.0.0.1:$port/ups" true "$@"
fi

if wanted azurite; then
    port=$(free_port)
    mkdir "$work/azurite"
    serve node "$stores/azurite-3.34.0/node_modules/.bin/azurite-blob" --blobHost 127.0.0.1 --blobPort "$port" \
        --location "$work/azurite" --silent --disableTelemetry --skipApiVersionCheck
    export AZURE_STORAGE_USE_EMULATOR=true AZURITE_BLOB_STORAGE_URL=http://127.0.0.1:$port
    /usr/bin/python3 "$here/azure_container.py" "$AZURITE_BLOB_STORAGE_URL" snapshots
    round Azurite az://snapshots/site true "$@"
fi

say "each store has what a repository needs"
