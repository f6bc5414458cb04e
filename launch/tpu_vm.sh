#!/usr/bin/env bash
# Trains on a Cloud TPU slice, or on several, from a machine that has gcloud. Each step finds out what is done and does the rest.
#
#   bash launch/tpu_vm.sh [--dry-run] up            create, setup, train
#   bash launch/tpu_vm.sh [--dry-run] keep          up, and again after each preemption until training is done; leave it running
#   bash launch/tpu_vm.sh [--dry-run] create        the queued resource; waits until its TPU VMs are there
#   bash launch/tpu_vm.sh [--dry-run] setup         copies the project to every host, installs it, mounts the storage
#   bash launch/tpu_vm.sh [--dry-run] train         starts training on every host, detached from here
#   bash launch/tpu_vm.sh [--dry-run] status        the queued resource's state, and each host's
#   bash launch/tpu_vm.sh [--dry-run] logs          follows what the first host prints
#   bash launch/tpu_vm.sh [--dry-run] stop          training saves and ends; the TPU VMs stay
#   bash launch/tpu_vm.sh [--dry-run] fetch [DIR]   copies the workdir here, to runs/RUN_NAME by default
#   bash launch/tpu_vm.sh [--dry-run] delete        the queued resource and its TPU VMs; not the storage
#
# The workdir has to be on storage that all hosts share and that outlives them: BUCKET or NFS. What each host does is in
# launch/tpu_vm_host.sh.
set -uo pipefail

# ---- Edit here; a variable of the environment goes before what is written here.
RUN_NAME="${RUN_NAME:-vgpt}"                              # of the queued resource, its TPU VMs, and the workdir
PROJECT="${PROJECT:-}"                                    # of Google Cloud; empty: gcloud's own
ZONE="${ZONE:-us-west4-a}"
ACCELERATOR_TYPE="${ACCELERATOR_TYPE:-v5litepod-16}"      # of one slice
RUNTIME_VERSION="${RUNTIME_VERSION:-v2-alpha-tpuv5-lite}" # v5p: v2-alpha-tpuv5, v6e: v2-alpha-tpuv6e, v4: tpu-ubuntu2204-base
SLICES="${SLICES:-1}"                                     # more than 1: multislice
TIER="${TIER:-spot}"                                      # spot (can be preempted), reserved, or on-demand
BUCKET="${BUCKET:-}"                                      # a bucket with hierarchical namespace, without gs://
NFS="${NFS:-}"                                            # or a share, such as Filestore's: 10.0.0.2:/vol
MOUNT="${MOUNT:-/mnt/vgpt}"                               # where every host mounts it
WORKDIR="${WORKDIR:-$MOUNT/$RUN_NAME}"
TRAIN="${TRAIN:---config=configs/imagenet.py}"            # the arguments of vgpt_jax.main, but --workdir
POLL="${POLL:-60}"                                        # seconds from one look to the next
# ---- To here.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
source launch/dry_run.sh
if [ "${1:-}" = --dry-run ]; then
  dry_run=yes
  shift
fi

RESOURCES=(gcloud compute tpus queued-resources)
AT=(--zone="$ZONE" --quiet)
[ -z "$PROJECT" ] || AT+=(--project="$PROJECT")
CODE=(README.md LICENSE pyproject.toml requirements.txt configs launch vgpt_jax)  # what is copied to the hosts

on_hosts() {  # runs a line of shell on every host of every slice
  run "${RESOURCES[@]}" ssh "$RUN_NAME" "${AT[@]}" --node=all --worker=all --command="$1"
}

host_does() {  # a step of launch/tpu_vm_host.sh, as a line of shell
  quoted env BUCKET="$BUCKET" NFS="$NFS" MOUNT="$MOUNT" WORKDIR="$WORKDIR" TRAIN="$TRAIN" bash vgpt/launch/tpu_vm_host.sh "$@"
}

state() {  # of the queued resource; nothing where there is none
  "${RESOURCES[@]}" list "${AT[@]}" --filter="name~/queuedResources/$RUN_NAME\$" --format="value(state.state)" ||
    fail "gcloud does not answer: is 'gcloud auth login' done, and are PROJECT and ZONE right?"
}

request() {
  local options=(--accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION")
  if [ "$SLICES" -gt 1 ]; then
    options+=(--node-count="$SLICES" --node-prefix="$RUN_NAME")
  else
    options+=(--node-id="$RUN_NAME")
  fi
  [ "$TIER" = on-demand ] || options+=("--$TIER")
  run "${RESOURCES[@]}" create "$RUN_NAME" "${AT[@]}" "${options[@]}" || fail "the queued resource was not accepted: see above"
}

remove() {
  run "${RESOURCES[@]}" delete "$RUN_NAME" "${AT[@]}" --force || fail "the queued resource could not be deleted: see above"
}

create() {
  local found requested=no said=none
  if [ "$dry_run" = yes ]; then
    say "unless it is there; one that FAILED or was SUSPENDED is deleted before:"
    request
    say "and wait until it is ACTIVE"
    return
  fi
  while :; do
    found="$(state)" || exit 2
    [ "$found" = "$said" ] || say "$RUN_NAME: ${found:-not there}"
    said="$found"
    case "$found" in
      ACTIVE) return ;;
      "")
        request
        requested=yes
        ;;
      FAILED | SUSPENDED)
        if [ "$found" = FAILED ] && [ "$requested" = yes ]; then
          fail "the request failed; why says: $(quoted "${RESOURCES[@]}" describe "$RUN_NAME" "${AT[@]}")"
        fi
        remove
        ;;
      *) sleep "$POLL" ;;  # it waits for its turn, is being made, or on its way out
    esac
  done
}

setup() {
  local checksum archive
  # The order of names and the times of the files are this machine's own: the same files give the same sum.
  checksum="$(tar --exclude=__pycache__ -cf - "${CODE[@]}" | cksum | tr ' ' -)" || fail "the project could not be packed"
  if [ "$dry_run" = yes ]; then
    say "unless every host answers that it has this:"
  fi
  if on_hosts "$(quoted grep -qsx "$checksum" vgpt/set_up)" && [ "$dry_run" = no ]; then
    say "every host is set up"
    return
  fi
  archive="${TMPDIR:-/tmp}/vgpt-$checksum.tar"
  run tar --exclude=__pycache__ -cf "$archive" "${CODE[@]}" || fail "the project could not be packed"
  run "${RESOURCES[@]}" scp "$archive" "$RUN_NAME:code.tar" "${AT[@]}" --node=all --worker=all ||
    fail "the project could not be copied to every host: see above (several hosts need 'ssh-add ~/.ssh/google_compute_engine')"
  on_hosts "mkdir -p vgpt && tar -xf code.tar -C vgpt launch/tpu_vm_host.sh && $(host_does set_up "$checksum")" ||
    fail "not every host could be set up: see above"
  run rm -f "$archive"
}

train() {
  on_hosts "$(host_does train)" || fail "training did not start on every host: see above (is 'setup' done?)"
}

status() {
  if [ "$dry_run" = no ]; then
    local found
    found="$(state)" || exit 2
    say "$RUN_NAME: ${found:-not there}"
    [ "$found" = ACTIVE ] || return 0
  fi
  on_hosts "$(host_does status)"
}

up() {
  create
  setup
  train
}

keep() {
  local found hosts
  up
  if [ "$dry_run" = yes ]; then
    say "every $POLL s, and all of the above again where the queued resource is not ACTIVE or a host does not train:"
    on_hosts "$(host_does status)"
    return
  fi
  while :; do
    sleep "$POLL"
    found="$(state)" || continue  # no answer from gcloud is no reason to give up
    if [ "$found" != ACTIVE ]; then
      up
      continue
    fi
    hosts="$(on_hosts "$(host_does status)")" || continue  # they may be going down
    case "$hosts" in
      *"ended 2"*) fail "training needs you: bash launch/tpu_vm.sh logs" ;;
      *"ended "[!0]*) fail "training crashed too often: bash launch/tpu_vm.sh logs" ;;
      *stopp*) fail "training was stopped: 'keep' once more goes on with it" ;;
      *interrupted* | *"not started"*) train ;;  # where it does not run
      *running*) ;;
      *"ended 0"*)
        say "training is done"
        return
        ;;
    esac
  done
}

fetch() {
  local to="${1:-runs/$RUN_NAME}"
  run mkdir -p "$to" || exit 1
  if [ -n "$BUCKET" ]; then  # also when the hosts are gone
    run gcloud storage rsync --recursive "gs://$BUCKET/${WORKDIR#"$MOUNT"/}" "$to"
  else
    run "${RESOURCES[@]}" scp --recurse "$RUN_NAME:$WORKDIR/*" "$to" "${AT[@]}" --node=0 --worker=0
  fi
}

delete() {
  if [ "$dry_run" = no ]; then
    local found
    found="$(state)" || exit 2
    if [ -z "$found" ]; then
      say "$RUN_NAME is not there"
      return
    fi
  fi
  remove
}

case "$RUN_NAME" in
  *[!a-z0-9-]* | [!a-z]* | *-) fail "RUN_NAME is '$RUN_NAME', but must be a small letter, then more, digits, or - inside" ;;
esac
check_number SLICES "$SLICES" 1
check_number POLL "$POLL"
check_word TIER "$TIER" spot reserved on-demand
[ -z "$BUCKET" ] || [ -z "$NFS" ] || fail "BUCKET and NFS are both given: where is the workdir?"
case "$WORKDIR" in
  "$MOUNT"/*) [ -n "$BUCKET$NFS" ] || fail "neither BUCKET nor NFS is given: the hosts need one folder that all of them see" ;;
  /*) [ -z "$BUCKET$NFS" ] || fail "WORKDIR is $WORKDIR, but must be in $MOUNT, where BUCKET or NFS is mounted" ;;
  *) fail "WORKDIR is '$WORKDIR', but must be a whole path, beginning with /" ;;
esac
command="${1:-}"
case "$command" in
  up | keep | create | setup | train | status | delete) "$command" ;;
  logs) run "${RESOURCES[@]}" ssh "$RUN_NAME" "${AT[@]}" --node=0 --worker=0 --command="tail -n 100 -F vgpt/train.log" ;;
  stop) on_hosts "$(host_does stop)" ;;
  fetch) fetch "${2:-}" ;;
  *) fail "bash launch/tpu_vm.sh [--dry-run] SUBCOMMAND (up, keep, status, logs, ...: see its head), not '$command'" ;;
esac
