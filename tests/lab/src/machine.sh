#!/bin/bash
# A machine with systemd as its first process, for machine.rs: machine.sh DIR NAME ENGINE_PATH, in a mount namespace of its own.
# Its root is an overlay of this machine's, without this machine's units; it boots again until DIR/off is there.
set -eu
dir=$1 name=$2 engine=$3 root=$1/root
mount --make-rprivate /
mkdir -p "$dir"/{disk,root,docker}
mount -t tmpfs -o size=4g tmpfs "$dir/disk"
mkdir "$dir/disk/upper" "$dir/disk/work"
mount -t overlay overlay -o "lowerdir=/,upperdir=$dir/disk/upper,workdir=$dir/disk/work" "$root"
rm -rf "$root"/etc/systemd/{system,user} "$root"/etc/docker "$root"/var/lib/{bulkhead,docker,containerd} "$root"/var/log/journal
mkdir -p "$root/etc/systemd/system" "$root/var/lib/docker" "$root/mnt/before"
: > "$root/etc/machine-id"
: > "$root/etc/fstab"
# What would reach for hardware or for this machine's kernel.
for unit in systemd-{udevd,udev-trigger,udev-settle,modules-load,sysctl,networkd,resolved,timesyncd,logind,hwdb-update,remount-fs,binfmt}.service \
    getty@tty1.service console-getty.service dev-hugepages.mount dev-mqueue.mount sys-kernel-{debug,tracing,config}.mount \
    proc-sys-fs-binfmt_misc.automount; do
    ln -s /dev/null "$root/etc/systemd/system/$unit"
done
ln -s /lib/systemd/system/multi-user.target "$root/etc/systemd/system/default.target"
cat > "$root/etc/systemd/system/docker.service" <<UNIT
[Unit]
Description=Docker
After=local-fs.target
[Service]
Type=notify
Environment=PATH=$engine:/usr/sbin:/usr/bin:/sbin:/bin
ExecStartPre=/bin/sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding'
ExecStart=/bin/sh -c 'exec dockerd --exec-opt native.cgroupdriver=cgroupfs --bip 172.30.0.1/24 --default-address-pool base=172.31.0.0/16,size=24'
Delegate=yes
Restart=always
[Install]
WantedBy=multi-user.target
UNIT
mkdir "$root/etc/systemd/system/multi-user.target.wants"
ln -s /etc/systemd/system/docker.service "$root/etc/systemd/system/multi-user.target.wants/"
# An overlay cannot lie on an overlay: the engine's data get a file system of their own.
mount -t tmpfs tmpfs "$root/var/lib/docker"

for hierarchy in /sys/fs/cgroup/*/; do
    [ -e "$hierarchy/cgroup.procs" ] || continue
    mkdir "$hierarchy/$name"
    if [ -e "$hierarchy/cpuset.cpus" ]; then
        cat "$hierarchy/cpuset.cpus" > "$hierarchy/$name/cpuset.cpus"
        cat "$hierarchy/cpuset.mems" > "$hierarchy/$name/cpuset.mems"
    fi
    echo $$ > "$hierarchy/$name/cgroup.procs"
done

cat > "$dir/init" <<'INIT'
set -eu
root=$1
mount --make-rprivate /
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t tmpfs tmpfs "$root/dev"
mkdir "$root/dev/pts" "$root/dev/shm"
for device in null zero full random urandom tty; do
    : > "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
: > "$root/dev/kmsg"
mount --bind /dev/null "$root/dev/kmsg"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/sys/fs/cgroup"
while IFS=: read -r _ controllers _; do
    [ -n "$controllers" ] || continue
    at=$root/sys/fs/cgroup/${controllers#name=}
    mkdir "$at"
    case $controllers in
        name=*) mount -t cgroup -o "none,$controllers" cgroup "$at" ;;
        *) mount -t cgroup -o "$controllers" cgroup "$at" ;;
    esac
done < /proc/self/cgroup
ip link set lo up
hostname machine
cd "$root"
pivot_root . mnt/before
umount -l /mnt/before
exec env -i container=lab PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --log-level=info --log-target=console < /dev/null
INIT

until [ -e "$dir/off" ]; do
    unshare --pid --fork --kill-child --mount --uts --ipc --net --cgroup /bin/bash "$dir/init" "$root" || true
done
