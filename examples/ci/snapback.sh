# Taking a guest for a CI job and giving it back, for the scripts beside this file. To be sourced.
#
# Needs curl (7.76 or later), jq and, to run commands in the guest, ssh. Settings, from the
# environment:
#
#   SNAPBACK_POOL      the pool to take guests from
#   SNAPBACK_SOCKET    the daemon's socket; /run/snapback/daemon.sock where unset
#   SNAPBACK_WAIT      seconds to wait for a guest while all are in use; 600 where unset
#   SNAPBACK_SSH_PORT  the port of this host that the recorded command line forwards to the
#                      guest's SSH server (hostfwd=tcp:127.0.0.1:2222-:22); 2222 where unset. Each
#                      guest has another port in its place
#   SNAPBACK_SSH_USER  who logs in; ci where unset
#   SNAPBACK_SSH_KEY   a file with a private key that the guest takes
#
# Tried with snapback's test guest and a stand-in for ssh, since that guest has no network: by
# clients/python/tests/test_ci.py.
# shellcheck shell=bash

socket=${SNAPBACK_SOCKET:-/run/snapback/daemon.sock}

# api METHOD PATH [BODY] : asks the daemon; prints its answer, or its error to stderr.
api() {
    local answer body=()
    [ $# -lt 3 ] || body=(--header 'Content-Type: application/json' --data "$3")
    if answer=$(curl --silent --show-error --fail-with-body --unix-socket "$socket" \
        --request "$1" "${body[@]}" "http://localhost$2" 2>/dev/null); then
        printf '%s\n' "$answer"
    else
        { [ -n "$answer" ] &&
            jq -r '"snapback: \(.message) [\(.code)]"' >&2 2>/dev/null <<<"$answer"; } ||
            echo "snapback: the daemon at $socket does not answer" >&2
        return 1
    fi
}

# take NAME : takes a guest and prints it as JSON.
take() {
    local body wait=${SNAPBACK_WAIT:-600}
    # A job may have named it, and it becomes a part of a URL.
    [[ ${SNAPBACK_POOL:-} =~ ^[a-zA-Z0-9_][a-zA-Z0-9._-]*$ ]] || {
        echo "snapback: SNAPBACK_POOL is \`${SNAPBACK_POOL:-}\`, and no name of a pool" >&2
        return 1
    }
    body=$(jq -n --arg name "$1" --argjson wait "$wait" '{name: $name, timeout_s: $wait}')
    api POST "/v1/pools/$SNAPBACK_POOL/take" "$body"
}

# name KIND OF : a name for a guest, of which there may be 32 letters, digits, `.`, `_` and `-`.
name() {
    local name=$1-${2//[^a-zA-Z0-9._-]/-}
    [ ${#name} -le 32 ] || name=$1-$(cksum <<<"$2" | tr -d ' ')
    echo "$name"
}

# guest NAME : prints the guest of that name as JSON, nothing if there is none.
guest() {
    local all
    all=$(api GET /v1/guests) || return 1
    jq -c --arg name "$1" 'first(.[] | select(.name == $name))' <<<"$all"
}

# release NAME : ends the guest of that name; it may have ended before.
release() {
    local found
    found=$(guest "$1") || return 1
    [ -n "$found" ] || return 0
    api DELETE "/v1/guests/$(jq -r .id <<<"$found")" || [ -z "$(guest "$1")" ]
}

# port GUEST : the port of this host that leads to its SSH server.
port() {
    jq -r --arg port "${SNAPBACK_SSH_PORT:-2222}" '.ports[$port] // empty' <<<"$1"
}

# in_guest GUEST COMMAND... : runs a command there, with this script's standard input.
in_guest() {
    local guest=$1 key=() port
    shift
    port=$(port "$guest")
    [ -n "$port" ] || {
        echo "snapback: the guest has no port in place of ${SNAPBACK_SSH_PORT:-2222}: set SNAPBACK_SSH_PORT" >&2
        return 255
    }
    [ -z "${SNAPBACK_SSH_KEY:-}" ] || key=(-i "$SNAPBACK_SSH_KEY")
    # All guests of an image have the same host key, at ports that are used again: there is
    # nothing for ssh to remember.
    ssh -q "${key[@]}" -p "$port" -o BatchMode=yes -o ConnectTimeout=30 \
        -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
        "${SNAPBACK_SSH_USER:-ci}@127.0.0.1" "$@"
}
