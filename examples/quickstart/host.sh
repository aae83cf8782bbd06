# The stage of the quickstart: a host and an internet, each a network namespace, with a real Docker Engine on the host.
# Sourced by `run`. Nothing leaves the two namespaces, and the machine's own network and engine are not touched.

# Named as the test lab names its own, so that it is also swept away should this be killed with SIGKILL.
host=bhlab-$$-0-host
internet=bhlab-$$-1-internet
dir=/tmp/bhlab-$$-2-quickstart
pids=()

on_host() { nsenter --net=/run/netns/$host "$@"; }
on_internet() { nsenter --net=/run/netns/$internet "$@"; }

# The engine's programs: those that BULKHEAD_ENGINE names, else those on PATH, else what tests/setup left in the cache.
find_engine() {
    local debian=$BULKHEAD_LAB/engine20 current=$BULKHEAD_LAB/engine29/bin
    engine_flags=()
    case ${BULKHEAD_ENGINE:-} in
    '')
        if ! command -v dockerd >/dev/null || ! command -v docker >/dev/null; then
            if [ -x "$debian/usr/sbin/dockerd" ]; then BULKHEAD_ENGINE=20; else BULKHEAD_ENGINE=29; fi
            find_engine
            return
        fi
        ;;
    path) ;;
    20) PATH=$debian/usr/sbin:$debian/usr/bin:$PATH ;;
    29 | 29-nftables)
        # The client is not built with it: anyone's will do.
        PATH=$current:$PATH:$debian/usr/bin
        [ "$BULKHEAD_ENGINE" = 29 ] || engine_flags=(--firewall-backend=nftables)
        ;;
    *)
        echo "BULKHEAD_ENGINE=$BULKHEAD_ENGINE: path, 20, 29 or 29-nftables" >&2
        return 1
        ;;
    esac
    case ${BULKHEAD_ENGINE:-}:$(command -v dockerd) in
    20:"$debian"/* | 29*:"$current"/* | path:/* | :/*) command -v docker >/dev/null && return ;;
    esac
    echo "no Docker Engine${BULKHEAD_ENGINE:+ for BULKHEAD_ENGINE=$BULKHEAD_ENGINE}, or no docker to talk to it" >&2
    echo "  tests/setup/engine fetches Debian's, tests/setup/engine29 builds a current one; both keep it in $BULKHEAD_LAB" >&2
    return 1
}

host_up() {
    mkdir -p $dir/bin $dir/www $dir/client
    chmod 755 $dir $dir/bin
    ip netns add $host
    ip netns add $internet
    ip -n $host link set lo up
    ip -n $internet link set lo up
    # An engine expects to find forwarding on (29) or switches it on (20).
    on_host sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
    ip link add up0 netns $host type veth peer name down0 netns $internet
    ip -n $host addr add 203.0.113.2/30 dev up0
    ip -n $host link set up0 up
    ip -n $host route add default via 203.0.113.1
    ip -n $internet addr add 203.0.113.1/30 dev down0
    ip -n $internet link set down0 up
    ip -n $internet addr add 203.0.113.53/32 dev lo
    ip -n $internet addr add 203.0.113.80/32 dev lo
    echo 'the api says: fine' >$dir/www/index.html
    start on_internet dnsmasq --keep-in-foreground --conf-file=/dev/null --no-resolv --no-hosts --bind-interfaces --user=root \
        --pid-file= --local=/#/ --listen-address=203.0.113.53 --host-record=api.example.com,203.0.113.80
    start on_internet busybox httpd -f -p 203.0.113.80:80 -h $dir/www

    # Before 25 an engine leaves a key in /etc/docker unless told otherwise.
    case $(command -v dockerd) in
    "$BULKHEAD_LAB/engine20"/*) echo "{\"deprecated-key-path\": \"$dir/key.json\"}" ;;
    *) echo '{}' ;;
    esac >$dir/daemon.json
    export DOCKER_HOST=unix://$dir/docker.sock DOCKER_CONFIG=$dir/client
    start on_host dockerd --config-file $dir/daemon.json --data-root $dir/data --exec-root $dir/exec --pidfile $dir/dockerd.pid \
        --host "$DOCKER_HOST" --dns 203.0.113.53 --bip 172.30.0.1/24 --default-address-pool base=172.31.0.0/16,size=24 \
        --exec-opt native.cgroupdriver=cgroupfs --cgroup-parent=/bhlab-$$-2-quickstart "${engine_flags[@]}"
    within 30 docker version
}

# start COMMAND...: in the background, its words in the log, ended by host_down.
start() {
    "$@" >>$dir/log 2>&1 </dev/null &
    pids+=($!)
}

# image NAME...: `docker import` of a folder with one small program and the libraries it names.
images() {
    local root=$dir/root library name
    mkdir -p $root/bin $root/etc
    cp "$bin/standin" $root/bin/
    for library in $(ldd "$bin/standin" | grep -o '/[^ ]*'); do
        mkdir -p "$root${library%/*}"
        cp -L "$library" "$root$library"
    done
    for name in "$@"; do
        tar -C $root -c . | docker import --change 'ENV PATH=/bin' - "demo/$name:1" >/dev/null || return
    done
}

compose() {
    local program=("$BULKHEAD_LAB/engine29/bin/docker-compose")
    [ -x "${program[0]}" ] || program=(docker-compose)
    command -v "${program[0]}" >/dev/null || program=(docker compose)
    "${program[@]}" -p voting -f examples/quickstart/compose.yaml "$@"
}

# What `bulkhead down` has to leave as it was: every rule, every switch of every bridge, the sysctls we might touch, the links.
picture() {
    echo "# rules"
    on_host nft -s list ruleset 2>/dev/null
    echo "# bridges"
    on_host ip -d -o link show type bridge | grep -oE '^[0-9]+: [^:]+|nf_call_[a-z0-9]+ [01]'
    echo "# switches"
    on_host sysctl -a -r '^net\.(bridge\.|netfilter\.nf_conntrack_(acct|timestamp|events)|ipv[46]\.conf\..*\.(forwarding|rp_filter)|ipv4\.ip_forward)' 2>/dev/null
    echo "# links"
    on_host ip -o link | cut -d: -f2
}

# Whatever runs in the two namespaces ends with them: dockerd, containerd, the shims; then the containers, by our own cgroups.
host_down() {
    local netns pid cgroup mount
    for netns in $host $internet; do
        for pid in $(ip netns pids $netns 2>/dev/null); do
            kill -KILL "$pid" 2>/dev/null
        done
    done
    for _ in 1 2 3 4 5; do
        find /sys/fs/cgroup -maxdepth 2 -type d -name "bhlab-$$-2-quickstart" 2>/dev/null | while read -r cgroup; do
            find "$cgroup" -name cgroup.procs -exec cat {} + 2>/dev/null | sort -u | xargs -r kill -KILL 2>/dev/null
            find "$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null
        done
        [ -z "$(find /sys/fs/cgroup -maxdepth 2 -type d -name "bhlab-$$-2-quickstart" 2>/dev/null)" ] && break
        sleep 0.2
    done
    for pid in "${pids[@]}"; do
        kill -KILL "$pid" 2>/dev/null
        wait "$pid" 2>/dev/null
    done
    awk -v below="$dir/" 'index($2, below) == 1 { print $2 }' /proc/self/mounts | sort -r | while read -r mount; do
        umount -l "$mount" 2>/dev/null
    done
    ip netns del $host 2>/dev/null
    ip netns del $internet 2>/dev/null
    rm -rf $dir
}
