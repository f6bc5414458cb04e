#!/usr/bin/env bash
# Trains on GPU nodes under Slurm. Run it on a login node; the repository and the workdir are on a file system that all nodes
# share.
#
#   bash launch/slurm.sh [--dry-run] submit     set up .venv here, submit the job; not if it is queued or running
#   bash launch/slurm.sh [--dry-run] status     the job, if it is queued or running
#   bash launch/slurm.sh [--dry-run] logs       follow what it prints
#   bash launch/slurm.sh [--dry-run] stop       end it for good; a running one saves first
#
# Shortly before its time limit, and when it is preempted, training saves and exits with 75, and the job goes back into the
# queue; a crash is tried again on the same nodes; an error that a person has to mend ends the job.
set -uo pipefail

# ---- Edit here; a variable of the environment goes before what is written here.
RUN_NAME="${RUN_NAME:-vgpt}"              # of the job
TRAIN="${TRAIN:---config=configs/imagenet.py --workdir=runs/imagenet}"  # the arguments of vgpt_jax.main
NODES="${NODES:-1}"
GPUS="${GPUS:-8}"                         # of each node; 0: none
PROCESS_PER="${PROCESS_PER:-node}"        # node: one process for all its GPUs; gpu: one for each
CPUS="${CPUS:-}"                          # processor cores of each process; empty: as the cluster has it
TIME_LIMIT="${TIME_LIMIT:-24:00:00}"
GRACE="${GRACE:-300}"                     # seconds before the limit at which training saves; Slurm may be a minute early
PARTITION="${PARTITION:-}"                # empty: the cluster's default
ACCOUNT="${ACCOUNT:-}"                    # empty: yours
SBATCH_MORE="${SBATCH_MORE:-}"            # more options of sbatch, such as: --exclusive --mem=0
EXTRA="${EXTRA:-cuda}"                    # the extra of pyproject.toml that .venv gets
LOG="${LOG:-runs/$RUN_NAME.log}"          # what the job prints, over all its starts
# ---- To here.

if [ "${1:-}" != job ]; then  # the job runs from Slurm's copy of this file, in the repository's root
  cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
fi
source launch/dry_run.sh
if [ "${1:-}" = --dry-run ]; then
  dry_run=yes
  shift
fi
read -ra train <<< "$TRAIN"
read -ra more <<< "$SBATCH_MORE"

queued() {  # the numbers of this run's jobs
  squeue --user="$(id -un)" --name="$RUN_NAME" --noheader --format=%i || fail "squeue does not answer"
}

submit() {
  local tasks=1 options
  check_number NODES "$NODES" 1
  check_number GPUS "$GPUS"
  check_number GRACE "$GRACE" 1
  check_word PROCESS_PER "$PROCESS_PER" node gpu
  [ -z "$CPUS" ] || check_number CPUS "$CPUS" 1
  if [ "$PROCESS_PER" = gpu ]; then
    [ "$GPUS" -gt 0 ] || fail "PROCESS_PER is gpu, but GPUS is 0: set GPUS to the number of a node's GPUs"
    tasks=$GPUS
  fi
  options=(--job-name="$RUN_NAME" --nodes="$NODES" --ntasks-per-node="$tasks" --time="$TIME_LIMIT" --chdir="$PWD")
  options+=(--requeue --signal="TERM@$GRACE" --open-mode=append --output="$LOG")
  [ "$GPUS" -eq 0 ] || options+=(--gpus-per-node="$GPUS")
  [ -z "$CPUS" ] || options+=(--cpus-per-task="$CPUS")
  [ -z "$PARTITION" ] || options+=(--partition="$PARTITION")
  [ -z "$ACCOUNT" ] || options+=(--account="$ACCOUNT")
  if [ "$dry_run" = no ]; then
    local there
    there="$(queued)" || exit 2
    if [ -n "$there" ]; then
      say "$RUN_NAME is there: job" $there
      return
    fi
  fi
  # What Slurm hands to the job with --export=ALL, its default.
  export RUN_NAME TRAIN GPUS PROCESS_PER CPUS
  run bash -c 'source launch/environment.sh && environment "$1"' set_up "$EXTRA" || exit 1
  run mkdir -p "$(dirname "$LOG")"
  run sbatch "${options[@]}" ${more[@]+"${more[@]}"} launch/slurm.sh job
  if [ "$dry_run" = yes ]; then
    say "and in the job, on its first node:"
    job
  fi
}

job() {  # what Slurm runs on the first node
  local step=(srun --kill-on-bad-exit=1)
  [ -z "$CPUS" ] || step+=(--cpus-per-task="$CPUS")  # from Slurm 22.05 on, srun does not take it over from sbatch
  if [ "$PROCESS_PER" = node ] && [ "$GPUS" -gt 0 ]; then
    # Under Slurm, JAX gives each process one GPU unless it is told otherwise.
    JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 $((GPUS - 1)))"
    step=(env JAX_LOCAL_DEVICE_IDS="$JAX_LOCAL_DEVICE_IDS" "${step[@]}")
  fi
  step+=(.venv/bin/python -m vgpt_jax.main "${train[@]}")
  if [ "$dry_run" = yes ]; then
    run env ON_75=end bash launch/again.sh "${step[@]}"
    say "and where that exits with 75 by itself:"
    run scontrol requeue SLURM_JOB_ID
    return
  fi
  echo "$RUN_NAME: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"
  # At the time limit and at a preemption with a grace time, only the steps are told. This shell is told by "stop" and by
  # scancel, after which the job is not to come back, and at a preemption that Slurm itself follows with a requeue.
  local told=no interrupted status
  trap 'told=yes; interrupted=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
  ON_75=end bash launch/again.sh "${step[@]}" &
  while :; do
    interrupted=no
    wait $!
    status=$?
    [ "$interrupted" = yes ] || break
  done
  if [ "$status" -eq 75 ] && [ "$told" = no ]; then
    echo "$RUN_NAME: saved; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$status"
}

stop() {
  if [ "$dry_run" = yes ]; then
    say "those of: $(quoted squeue --user="$(id -un)" --name="$RUN_NAME" --noheader --format=%i)"
    run scancel --state=PENDING JOB
    run scancel --batch --signal=TERM JOB
    return
  fi
  local there
  there="$(queued)" || exit 2
  [ -n "$there" ] || say "$RUN_NAME is neither queued nor running"
  for there in $there; do
    scancel --state=PENDING "$there"
    scancel --batch --signal=TERM "$there" 2> /dev/null  # not where it was still queued
  done
}

case "${1:-}" in
  submit | job | stop) "$1" ;;
  status) run squeue --user="$(id -un)" --name="$RUN_NAME" ;;
  logs) run tail -n 100 -F "$LOG" ;;
  *) fail "bash launch/slurm.sh [--dry-run] submit, status, logs or stop, not '${1:-}'" ;;
esac
