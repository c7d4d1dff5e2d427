#!/usr/bin/env bash
# Two hosts on one machine: network namespaces, joined by a cable. Needs Linux and root.
#
#   benchmarks/two_hosts.sh up                 make them: host1 (10.101.0.1), host2 (10.101.0.2)
#   benchmarks/two_hosts.sh on host2 COMMAND   run a command on one, in the current folder
#   benchmarks/two_hosts.sh train OPTIONS      torchrun ... train.py OPTIONS, one process on each
#   benchmarks/two_hosts.sh cut                pull the cable out; `mend` puts it back
#   benchmarks/two_hosts.sh down               remove them
#
# Each has an interface eth0 and a name of its own. Files and processors are shared.
set -euo pipefail

both() { for host in host1 host2; do "$@" "$host"; done; }

start_host() {
    ip netns add "$1"
    ip -n "$1" link set lo up
    # What a container engine leaves on a host: an interface with the same address everywhere.
    ip -n "$1" link add docker0 type bridge
    ip -n "$1" address add 172.17.0.1/16 dev docker0
    ip -n "$1" link set docker0 up
}

up() {
    both start_host
    ip link add eth0 netns host1 type veth peer name eth0 netns host2
    for n in 1 2; do
        ip -n "host$n" address add "10.101.0.$n/24" dev eth0
        ip -n "host$n" link set eth0 up
    done
}

# `ip netns exec` gives the command mounts of its own: nobody else sees this /etc/hosts.
on() {
    local host=$1
    shift
    ip netns exec "$host" unshare --uts bash -euc '
        hostname "$0"
        names=$(mktemp)
        printf "%s\n" "127.0.0.1 localhost" "10.101.0.1 host1" "10.101.0.2 host2" >"$names"
        mount --bind "$names" /etc/hosts
        rm "$names"
        mount --bind /dev/null /etc/resolv.conf  # no name server: an answer at once
        exec "$@"' "$host" "$@"
}

train() {
    local launch=(torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id two-hosts
        --rdzv-endpoint host1:29500 train.py --device cpu)
    on host2 env OMP_NUM_THREADS=1 "${launch[@]}" "$@" &
    local code=0
    on host1 env OMP_NUM_THREADS=1 "${launch[@]}" "$@" || code=$?
    wait $! || code=$?
    return $code
}

case ${1-} in
    up) up ;;
    on) on "${@:2}" ;;
    train) train "${@:2}" ;;
    cut) ip -n host1 link set eth0 down ;;
    mend) ip -n host1 link set eth0 up ;;
    down) both ip netns delete ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
