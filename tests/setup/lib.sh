# For the scripts beside this one, and for examples/quickstart/run. Sourced, never run.
#
# What these scripts may do to a machine: install Debian packages that start nothing, and keep downloads and builds in one
# cache folder. They never install an engine as a service, never start one, and never replace one that is there.

# Where downloads and builds are kept between runs.
export BULKHEAD_LAB=${BULKHEAD_LAB:-${HOME:-/root}/.cache/bulkhead-lab}

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
    echo "installing: ${missing[*]}"
    local guard=/usr/sbin/policy-rc.d made=
    if [ ! -e $guard ]; then
        printf '#!/bin/sh\nexit 101\n' >$guard && chmod 755 $guard && made=1
    fi
    local status=0
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null || {
        DEBIAN_FRONTEND=noninteractive apt-get update -qq >/dev/null &&
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    } || status=$?
    [ -n "$made" ] && rm -f $guard
    return $status
}

# Whether the go on PATH is at least this version, as in: has_go 1 26
has_go() {
    local version major minor
    version=$(go env GOVERSION 2>/dev/null) || return 1
    version=${version#go}
    major=${version%%.*}
    minor=${version#*.}
    minor=${minor%%[!0-9]*}
    [ "$major" -gt "$1" ] || { [ "$major" = "$1" ] && [ "${minor:-0}" -ge "$2" ]; }
}
