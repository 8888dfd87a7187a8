#!/usr/bin/env bash
# Starts a private SLURM of two nodes on this machine, as root, in under a second: munged, slurmctld and two slurmd, all on 127.0.0.1.
# usage: start.sh ROOT       then `. ROOT/env.sh` points every command of SLURM's at it; stop.sh ROOT ends it
set -euo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"
unset SLURM_CONF
here=$(cd "$(dirname "$0")" && pwd)
ROOT=$1
NODES=2 CPUS=2 PORT=17817

die() {
  echo "start.sh: $*" >&2
  tail -n 15 "$ROOT"/log/*.log >&2 2>/dev/null || true
  "$here/stop.sh" "$ROOT" >&2 || true
  exit 1
}

[ "$(id -u)" = 0 ] || { echo "start.sh: needs root (SlurmUser=root, namespaces of the nodes)" >&2; exit 1; }
missing=''
for program in munged slurmctld slurmd sbatch; do command -v "$program" >/dev/null || missing=yes; done
if [ -n "$missing" ]; then # RUNLEVEL=1 keeps the packages' own services from starting
  install() { RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge shellcheck; }
  install </dev/null >/dev/null 2>&1 || { apt-get update -qq && install </dev/null; } >&2 || { echo "start.sh: no SLURM, and apt-get installs none" >&2; exit 1; }
fi

# munge wants its folders owned by it and writable by nobody else
umask 022
mkdir -p "$ROOT"/{etc,state,spool,pid,log,munge}
head -c 1024 /dev/urandom >"$ROOT/munge/munge.key"
chmod 400 "$ROOT/munge/munge.key"

free() { ! ss -Hltn "sport = :$1" | grep -q .; }
for _ in $(seq 50); do # the first free block of ports
  taken=''
  for node in $(seq 0 "$NODES"); do free $((PORT + node)) || taken=yes; done
  [ -n "$taken" ] || break
  PORT=$((PORT + 20))
done

# Every listener on 127.0.0.1 (No*InAddrAny). Nodes differ by port and by the host name of their namespace: with addresses of their own srun hangs.
# cred_expire: a requeued job starts 6 s later instead of 121. SlurmdTimeout: a node whose daemon is gone is given up after 10 s instead of 300.
cat >"$ROOT/etc/slurm.conf" <<CONF
ClusterName=mhlatest
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$ROOT/munge/munge.sock,cred_expire=5
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool/%n
SlurmctldPidFile=$ROOT/pid/slurmctld.pid
SlurmdPidFile=$ROOT/pid/slurmd.%n.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobRequeue=1
EnforcePartLimits=ALL
ReturnToService=2
KillWait=30
EpilogMsgTime=0
MessageTimeout=10
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmdTimeout=10
InactiveLimit=0
MinJobAge=3600
$(for node in $(seq "$NODES"); do
  echo "NodeName=node$node NodeHostname=node$node NodeAddr=127.0.0.1 Port=$((PORT + node)) CPUs=$CPUS CoresPerSocket=$CPUS RealMemory=16000 State=UNKNOWN"
done)
PartitionName=debug Nodes=ALL Default=YES DefaultTime=10 MaxTime=120 State=UP
CONF
: >"$ROOT/etc/plugstack.conf"
{
  cat /etc/hosts
  for node in $(seq "$NODES"); do echo "127.0.0.1 node$node"; done
} >"$ROOT/etc/hosts"
echo "export SLURM_CONF=$ROOT/etc/slurm.conf" >"$ROOT/env.sh"
export SLURM_CONF=$ROOT/etc/slurm.conf

munged --num-threads=4 --key-file="$ROOT/munge/munge.key" --socket="$ROOT/munge/munge.sock" --pid-file="$ROOT/munge/munged.pid" \
  --log-file="$ROOT/log/munged.log" --seed-file="$ROOT/munge/munged.seed" </dev/null >"$ROOT/log/munged.out" 2>&1 || die "munged: $(cat "$ROOT/log/munged.out")"
cp "$ROOT/munge/munged.pid" "$ROOT/pid/munged.pid"
slurmctld -f "$SLURM_CONF" </dev/null >"$ROOT/log/slurmctld.out" 2>&1 || die "slurmctld: $(cat "$ROOT/log/slurmctld.out")"
for node in $(seq "$NODES"); do "$here/node.sh" "$ROOT" "node$node" || die "slurmd node$node: $(cat "$ROOT/log/slurmd.node$node.out")"; done

end=$((SECONDS + 30))
until [ "$(sinfo -h -N -p debug -o %T 2>/dev/null | grep -cx idle || true)" = "$NODES" ]; do
  [ "$SECONDS" -lt "$end" ] || die "nodes are not idle after 30 s"
  sleep 0.1
done
echo "SLURM $(sbatch --version) with $NODES nodes in $ROOT"
