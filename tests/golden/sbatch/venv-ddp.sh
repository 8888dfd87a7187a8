#!/bin/bash
# Written by `mhla submit`; you may edit it. To queue it by hand: cd into the folder of all runs; sbatch mine/slurm/train.sbatch
#SBATCH --job-name=mine
#SBATCH --partition=gpu
#SBATCH --account=my_project
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --mail-user=me@example.org
#SBATCH --mail-type=END,FAIL,REQUEUE
#SBATCH --signal=B:USR1@180
#SBATCH --output=mine/slurm/job.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --exclusive
# shellcheck disable=SC1091 # the files of a site exist only there

# Paths. All text of a user is in quotes here, or in YAML in the run's slurm/recipe.yaml.
RUNS=/shared/runs
RUN_ID=mine
RUN=$RUNS/$RUN_ID
JOB=$SLURM_JOB_ID
cd /home/me/project || exit 2

# The site's software
. /shared/envs/mhla/bin/activate

# The environment of every process. The code is the copy made at submission, so later edits change nothing.
export PYTHONPATH="$RUN/slurm/code${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=2
MASTER_PORT=$((15000 + SLURM_JOB_ID % 16000))  # below the ports that the kernel hands out
while (: >"/dev/tcp/localhost/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done  # while the port is taken
export MASTER_PORT
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not inherit it
MHLA_JOB_END=$(date -d "$(squeue -h -j "$JOB" -o %e)" +%s 2>/dev/null)
export MHLA_JOB_END  # training saves before this time
CACHES=/shared/cache
export HF_HOME="$CACHES/huggingface" TORCH_HOME="$CACHES/torch" TORCH_EXTENSIONS_DIR="$CACHES/torch_extensions" TRITON_CACHE_DIR="$CACHES/triton"
export NCCL_DEBUG=WARN
export TMPDIR="${SLURM_TMPDIR:?}"
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 mkdir -p "$TMPDIR"

say() { printf '%s job %s: %s\n' "$(date '+%F %T')" "$JOB" "$*"; }
progress() { sed -n "s/^  \"$1\": \"\{0,1\}\([^\",]*\).*/\1/p" "$RUN/progress.json" 2>/dev/null; }
record() { echo "$JOB ${SLURM_RESTART_COUNT:-0} $1 $2 $begun $3 $(date +%s)" >>"$RUN/slurm/attempts"; }  # `mhla status` reads it
newest_step() {
  local complete newest=0
  for complete in "$RUN"/checkpoints/step-*/COMPLETE; do
    [ -e "$complete" ] && newest=${complete%/COMPLETE} && newest=$((10#${newest##*step-}))
  done
  echo "$newest"
}

# Train: srun alone starts every process, under every strategy. A warning to this shell is passed to all processes: they save and end with 75.
begun=$(newest_step)
before=$(cat "$RUN/progress.json" 2>/dev/null)
record started - -
say "attempt $((${SLURM_RESTART_COUNT:-0} + 1)) of $RUN_ID on $SLURM_JOB_NODELIST, from step $begun"
srun --kill-on-bad-exit=1 --output="${RUN//%/%%}/slurm/rank-%t.log" --open-mode=append \
  python3 -m mhla_lightning run "$RUN/slurm/recipe.yaml" --runs "$RUNS" --run-id "$RUN_ID" &
step=$!
signalled='' warned=''
trap 'signalled=yes warned=yes; say "warned: training saves and stops"; kill -USR1 "$step"' USR1 TERM
while true; do # a trap ends `wait` early, without the exit code of srun
  signalled=''
  wait "$step"
  code=$?
  [ -n "$signalled" ] || break
done
trap '' USR1 TERM

# Decide what comes next. The exit code of srun is that of some rank; progress.json, when this attempt wrote it, is training's own report.
reached=$begun state=''
if [ "$(cat "$RUN/progress.json" 2>/dev/null)" != "$before" ]; then
  reached=$(progress step) state=$(progress state)
  reached=${reached:-$begun} # a power cut or a full disk may damage the file
fi
made=$((reached - begun)) recorded=''
queue=$(squeue -h -j "$JOB" -o %T 2>/dev/null)
if [ "$code" = 0 ]; then
  verdict=finished why="training is finished"
elif [ "$(cat "$RUN/slurm/cancelled" 2>/dev/null)" = "$JOB" ] || [ "$queue" = CANCELLED ]; then
  verdict=cancelled why="cancelled at step $reached"
elif [ "$code" = 2 ]; then
  verdict=mistake why="a mistake in the recipe or the data, see slurm/rank-0.log; not queued again"
elif [ "$code" = 75 ] || [ "$state" = preempted ] || [ -n "$warned" ]; then
  verdict=preempted why="stopped at step $reached" code=75
else
  verdict=failed why="failed with exit code $code at step $reached"
fi
record "$verdict" "$code" "$reached" && recorded=yes
count() { grep -c "^$JOB [0-9]* $1 " "$RUN/slurm/attempts"; }
idle=$(awk -v job="$JOB" -v last=-1 '$1 == job && $3 == "preempted" && NF == 7 { idle = $6 > $5 && $5 > last ? 0 : idle + 1; last = $5 } END { print idle + 0 }' "$RUN/slurm/attempts")
[ -n "$recorded" ] || idle=${SLURM_RESTART_COUNT:-0} # the disk is full
again=''
case $verdict in
  preempted)
    if [ "$idle" -lt 3 ]; then again=yes; else why="$why; not queued again: three attempts saved no new step"; fi ;;
  failed)
    if [ "$made" -lt 10 ]; then
      why="$why; not queued again: it made $made steps, and would fail there again"
    elif [ "$(count failed)" -gt 5 ]; then
      why="$why; not queued again after 5 restarts"
    else
      again=yes
    fi ;;
esac
say "$why${again:+; queued again}"
# After scontrol requeue or a lost node SLURM queues the job again by itself.
if [ -n "$again" ] && { [ "$queue" = RUNNING ] || [ "$queue" = TIMEOUT ]; }; then
  scontrol requeue "$JOB" || say "SLURM refuses to queue it again; use mhla resume $RUN_ID"
fi
exit "$code"
