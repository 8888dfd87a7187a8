#!/usr/bin/env bash
# Ends exactly what start.sh ROOT started: jobs, daemons (by pid file, checked), and what is left in the namespaces of its nodes.
set -uo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"
ROOT=$1
export SLURM_CONF=$ROOT/etc/slurm.conf

ours() { # ours PIDFILE PROGRAM: prints the pid where that process still is that program
  local pid
  pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] || return 1
  case "$({ tr '\0' ' ' <"/proc/$pid/cmdline"; } 2>/dev/null)" in *"$2"*) echo "$pid" ;; *) return 1 ;; esac
}
alive() { # a zombie counts as ended
  local stat
  stat=$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null) && [ -n "$stat" ] && [ "${stat%% *}" != Z ]
}

if ours "$ROOT/pid/slurmctld.pid" slurmctld >/dev/null; then
  mapfile -t jobs < <(timeout 5 squeue -h -o %A 2>/dev/null | sort -u)
  [ "${#jobs[@]}" = 0 ] || timeout 10 scancel "${jobs[@]}" 2>/dev/null
  for _ in $(seq 50); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.2; done
fi
for file in "$ROOT"/pid/slurmd.*.pid "$ROOT/pid/slurmctld.pid" "$ROOT/pid/munged.pid"; do
  name=$(basename "$file" .pid)
  pid=$(ours "$file" "${name%%.*}") || continue
  kill -TERM "$pid" 2>/dev/null
  for _ in $(seq 50); do alive "$pid" || break; sleep 0.1; done
  ! alive "$pid" || kill -KILL "$pid" 2>/dev/null
done
own=$(readlink /proc/self/ns/mnt) init=$(readlink /proc/1/ns/mnt)
cat "$ROOT"/pid/ns.* 2>/dev/null | sort -u | while read -r namespace; do
  case $namespace in "$own" | "$init") continue ;; esac # that would be everybody's processes
  for process in /proc/[0-9]*; do
    [ "$(readlink "$process/ns/mnt" 2>/dev/null)" = "$namespace" ] || continue
    echo "stop.sh: ended left-over process ${process#/proc/}: $({ tr '\0' ' ' <"$process/cmdline"; } 2>/dev/null | cut -c1-80)"
    kill -KILL "${process#/proc/}" 2>/dev/null
  done
done
rm -f "$ROOT"/pid/*
exit 0
