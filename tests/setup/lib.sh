# For the scripts beside this one, and for examples/quickstart/run. Sourced, never run.
#
# What these scripts may do to a machine: install Debian packages that start nothing, and keep downloads and builds in one
# cache folder. They never install an engine as a service, never start one, and never replace one that is there.

# The user whose clone this is, where sudo made us root: what is built in it, and for it in their home, is theirs.
owner=
if [ "$(id -u)" = 0 ] && [ "${SUDO_UID:-0}" != 0 ] && [ "$(stat -c %u "${BASH_SOURCE[0]}")" = "$SUDO_UID" ]; then
    owner=$SUDO_UID
    # sudo gives root's own HOME unless told otherwise.
    HOME=$(getent passwd "$owner" | cut -d: -f6)
    export HOME
fi

# Where downloads and builds are kept between runs.
export BULKHEAD_LAB=${BULKHEAD_LAB:-${HOME:-/root}/.cache/bulkhead-lab}

command -v cargo >/dev/null || PATH=$PATH:${CARGO_HOME:-${HOME:-/root}/.cargo}/bin
PATH=$PATH:/usr/sbin:/sbin

# as_owner COMMAND...: cargo writes into ~/.cargo too, where a file of root's would stop the owner's next build.
as_owner() {
    if [ -n "$owner" ]; then
        setpriv --reuid "$owner" --regid "${SUDO_GID:-$owner}" --init-groups "$@"
    else
        "$@"
    fi
}

# theirs PATH...: gives to the owner what root made.
theirs() {
    local path
    [ -n "$owner" ] || return 0
    for path in "$@"; do
        [ ! -e "$path" ] || chown -R "$owner:${SUDO_GID:-$owner}" "$path"
    done
}

# owned_folder PATH: makes it, and those above it, the owner's from the start where they may make it.
owned_folder() { as_owner mkdir -p "$1" 2>/dev/null || mkdir -p "$1"; }

# Before it is needed, so that the reason is the first thing said.
need_cargo() {
    command -v cargo >/dev/null && return
    echo "no cargo on PATH or in ${CARGO_HOME:-${HOME:-/root}/.cargo}/bin: install rustup (https://rustup.rs), then run this again" >&2
    exit 1
}

need_root() {
    [ "$(id -u)" = 0 ] && return
    echo "$0: needs root" >&2
    exit 1
}

# Installs what is missing of these Debian packages. While it runs, no service may be started: a fresh dnsmasq, docker or
# anything else that a package brings would run in the machine's own network namespace (policy-rc.d, Debian Policy 9.3.3.1).
install_packages() {
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return 0
    if ! command -v apt-get >/dev/null; then
        echo "missing and not installable here (no apt-get): ${missing[*]}" >&2
        return 1
    fi
    echo "installing (a minute or so): ${missing[*]}"
    local guard=/usr/sbin/policy-rc.d made= words
    words=$(mktemp) || return
    if [ ! -e $guard ]; then
        printf '#!/bin/sh\nexit 101\n' >$guard && chmod 755 $guard && made=1
    fi
    local status=0
    {
        apt_install "${missing[@]}" >"$words" 2>&1 || {
            apt-get update -qq >"$words" 2>&1 && apt_install "${missing[@]}" >"$words" 2>&1
        }
    } 9>&1 || status=$?
    [ -n "$made" ] && rm -f $guard
    if [ $status != 0 ]; then
        cat "$words" >&2
        echo "could not install: ${missing[*]}" >&2
        echo "  apt-get says why above; mend that (network, /etc/apt/sources.list), or install them yourself, and run this again" >&2
    fi
    rm -f "$words"
    return $status
}

# apt-get install PACKAGE..., its words to the output. If 9 is a terminal, that shows how far it is (apt's APT::Status-Fd).
apt_install() {
    local how=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends) kind percent
    if ! [ -t 9 ]; then
        "${how[@]}" "$@" 9>&-
        return
    fi
    {
        "${how[@]}" -o APT::Status-Fd=3 "$@" 3>&1 >&8 8>&- 9>&- | while IFS=: read -r kind _ percent _; do
            case $kind:$percent in
            dlstatus:[0-9]*) printf '\r  downloading %3d %%' "${percent%%.*}" ;;
            pmstatus:[0-9]*) printf '\r  installing  %3d %%' "${percent%%.*}" ;;
            esac >&9
        done
        set -- "${PIPESTATUS[0]}"
        printf '\r%20s\r' '' >&9
        return "$1"
    } 8>&1
}

# Whether the go on PATH is at least this version, as in: has_go 1 26
has_go() {
    local version major minor
    version=$(as_owner go env GOVERSION 2>/dev/null) || return 1
    version=${version#go}
    major=${version%%.*}
    minor=${version#*.}
    minor=${minor%%[!0-9]*}
    [ "$major" -gt "$1" ] || { [ "$major" = "$1" ] && [ "${minor:-0}" -ge "$2" ]; }
}
