# What the scripts here share. To be sourced, with `me` naming the script.
# shellcheck shell=bash

# Debian's release: of the machine, and of the Debian guest.
# shellcheck disable=SC2034 # used by who sources this
release=bookworm

say() { printf '%s: %s\n' "$me" "$*"; }
die() {
    say "$@" >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "must be root to run: $* (there is no sudo; run that as root, then try again)"
    fi
}

# The Debian mirror which the system uses for this release.
mirror() {
    local uri
    # shellcheck disable=SC2016 # the format is apt's, not the shell's
    uri=$(apt-get indextargets --format '$(CODENAME) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
        sed -n "s/^$release main \(https\?:.*\)/\1/p" | head -n 1)
    echo "${uri:-http://deb.debian.org/debian/}"
}
