# Furnishes a private host for container engines. Runs as its administrator, the first process of
# its namespaces; $1 is the folder shared with the test. Says "ready", then lives until its standard
# input ends.
set -eu

network() {
    ip link set lo up
    ip tuntap add dev host0 mode tap
    for address in 192.0.2.1/24 198.51.100.1/24 198.51.100.7/24; do
        ip address add $address dev host0
    done
    # Nobody answers for duplicates on a link without a carrier.
    for address in 2001:db8:1::1/64 2001:db8:2::1/64; do
        ip address add $address dev host0 nodad
    done
    ip link set host0 up
    echo 0 >/proc/sys/net/ipv4/ip_unprivileged_port_start
}

# Every entry of /etc leads to the machine's, save those that differ. /srv, because links in /etc
# may be relative and count on its depth.
etc() {
    mount --rbind /etc /srv
    mount -t tmpfs -o mode=755 tmpfs /etc
    ln -s /srv/* /etc/
    rm -rf /etc/passwd /etc/group /etc/subuid /etc/subgid /etc/resolv.conf /etc/hosts
    printf '%s\n' root:x:0:0::/:/bin/sh user:x:1000:1000::/home/user:/bin/sh >/etc/passwd
    printf '%s\n' root:x:0: user:x:1000: >/etc/group
    echo user:2000:60000 >/etc/subuid
    echo user:2000:60000 >/etc/subgid
    echo nameserver 192.0.2.1 >/etc/resolv.conf
    echo 127.0.0.1 localhost >/etc/hosts
}

# Set-user-ID counts only where the kernel knows the owner: a copy that belongs to this host's root.
id_mappers() {
    for program in newuidmap newgidmap; do
        original=$(command -v $program)
        cp "$original" /run/$program
        chmod 4755 /run/$program
        mount --bind /run/$program "$original"
    done
}

home() {
    mkdir -p /home/user/.config/containers /run/user/1000
    cat >/home/user/.config/containers/containers.conf <<-'END'
	[containers]
	cgroups="disabled"
	log_driver="k8s-file"
	[engine]
	cgroup_manager="cgroupfs"
	events_logger="file"
	runtime="crun"
	network_cmd_path="/mnt/bin/slirp4netns"
	END
    printf '[storage]\ndriver="vfs"\n' >/home/user/.config/containers/storage.conf
    echo '{"default":[{"type":"insecureAcceptAnything"}]}' >/home/user/.config/containers/policy.json
    chown -R 1000:1000 /home/user /run/user/1000
    chmod 700 /home/user /run/user/1000
}

# The image: busybox, and socat for datagrams. /bin/serve answers on 80/tcp and 5000/udp with who
# asked, and what; `/bin/ask UDP4:ADDRESS:PORT WORDS` prints what a server of datagrams answers.
image() {
    mkdir -p /run/image/bin /run/image/tmp /run/image/www/cgi-bin
    cd /run/image
    for program in busybox socat; do
        cp "$(command -v $program)" bin/
        for library in $(ldd "bin/$program" 2>/dev/null | grep -o '/[^ ]*' || true); do
            mkdir -p ".${library%/*}"
            cp -L "$library" ".$library"
        done
    done
    for applet in cat cut grep head httpd ip nslookup sh sleep tr wc wget; do
        ln -s busybox bin/$applet
    done
    cat >www/cgi-bin/who <<-'END'
	#!/bin/sh
	printf 'Content-Type: text/plain\r\n\r\n'
	echo "$NAME saw $REMOTE_ADDR say $QUERY_STRING"
	END
    cat >bin/answer <<-'END'
	#!/bin/sh
	read -r said
	echo "$NAME saw $SOCAT_PEERADDR say $said"
	END
    cat >bin/serve <<-'END'
	#!/bin/sh
	root=${0%/bin/serve}
	busybox httpd -p 0.0.0.0:80 -h "$root/www"
	# One at a time: socat's own way to serve several waits for a signal that may have come already.
	trap 'kill $!; exit' TERM INT
	while :; do
	    socat UDP4-RECVFROM:5000 "EXEC:$root/bin/answer" &
	    wait $!
	done
	END
    cat >bin/ask <<-'END'
	#!/bin/sh
	export WORDS="$2"
	exec socat -t0.01 "$1" 'SYSTEM:echo "$WORDS"; read -r heard; echo "$heard" >&3' 3>&1
	END
    chmod 755 bin/serve bin/answer bin/ask www/cgi-bin/who
    tar -cf /run/image.tar .
}

mount --bind "$1" /mnt
for folder in /tmp /run /home /var/tmp /dev/shm; do
    mount -t tmpfs -o mode=1777 tmpfs $folder
done
# Where the machine's hierarchies are mixed, crun sees the pure one only.
mount -t cgroup2 cgroup2 /sys/fs/cgroup
network
etc
id_mappers
home
image
cd /
# As on a machine: what engines unshare has to keep its mounts to itself.
mount --make-rshared /
echo ready
# Nobody else waits for orphans here: whoever ignores this signal has them reaped by the kernel.
exec env --ignore-signal=CHLD cat >/dev/null
