#!/usr/bin/env bash
# Starts the daemon of one node, also again after it was killed. The node is a namespace with a host name of its own, where node1 and node2 resolve.
# usage: node.sh ROOT NAME
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"
ROOT=$1 NAME=$2
mkdir -p "$ROOT/spool/$NAME"
# shellcheck disable=SC2016 # expanded by the inner shell
unshare --uts --mount --propagation private bash -c '
  hostname "$1" && mount --bind "$2/etc/hosts" /etc/hosts && exec slurmd -f "$2/etc/slurm.conf" -N "$1"' _ "$NAME" "$ROOT" \
  </dev/null >"$ROOT/log/slurmd.$NAME.out" 2>&1
for _ in $(seq 50); do # the daemon writes its pid when it stands
  pid=$(cat "$ROOT/pid/slurmd.$NAME.pid" 2>/dev/null) && readlink "/proc/$pid/ns/mnt" >>"$ROOT/pid/ns.$NAME" 2>/dev/null && exit 0
  sleep 0.1
done
exit 1
