#!/usr/bin/env bash
# Trains on Kubernetes: an Indexed Job of launch/kubernetes/, with one pod for each process.
#
#   bash launch/kubernetes.sh [--dry-run] image     builds the image and pushes it
#   bash launch/kubernetes.sh render                prints the Service and the Job, filled in
#   bash launch/kubernetes.sh [--dry-run] apply     starts the Job; where it is there, nothing is done twice
#   bash launch/kubernetes.sh [--dry-run] status    the Job and its pods
#   bash launch/kubernetes.sh [--dry-run] logs [I]  follows what the pod of process I prints, 0 by default
#   bash launch/kubernetes.sh [--dry-run] delete    ends it; training saves; not the volume
#
# A pod that is told to go saves and exits with 75; a new one takes its place and goes on, as often as that happens. Crashes are
# tried again CRASHES times. An error that a person has to mend ends the Job: see "logs", mend it, then "delete" and "apply".
set -uo pipefail

# ---- Edit here; a variable of the environment goes before what is written here.
RUN_NAME="${RUN_NAME:-vgpt}"             # of the Job, the Service and the pods
NAMESPACE="${NAMESPACE:-default}"
IMAGE="${IMAGE:-}"                       # such as europe-docker.pkg.dev/PROJECT/REPOSITORY/vgpt:1
EXTRA="${EXTRA-cuda}"                    # the extra of pyproject.toml in the image: cuda or tpu; empty for CPUs
PROCESSES="${PROCESSES:-2}"              # one for each node of GPUs or host of a TPU slice
RESOURCES="${RESOURCES-nvidia.com/gpu=8}"   # of each pod; a TPU host: google.com/tpu=4; also cpu=..., memory=...
NODE_SELECTOR="${NODE_SELECTOR:-}"       # TPU: cloud.google.com/gke-tpu-accelerator=... cloud.google.com/gke-tpu-topology=4x4
TOLERATE="${TOLERATE:-}"                 # taints of the nodes by their keys, such as cloud.google.com/gke-spot
CLAIM="${CLAIM:-}"                       # a PersistentVolumeClaim that all pods can write (ReadWriteMany)
MOUNT="${MOUNT:-/mnt/vgpt}"              # where the pods see it
TRAIN="${TRAIN:---config=configs/imagenet.py --workdir=$MOUNT/$RUN_NAME}"  # the arguments of vgpt_jax.main
CRASHES="${CRASHES:-5}"                  # of the run, after which it is tried again
GRACE="${GRACE:-120}"                    # seconds from TERM to KILL, for saving; a spot node may give less
# ---- To here.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
source launch/dry_run.sh
if [ "${1:-}" = --dry-run ]; then
  dry_run=yes
  shift
fi
KUBECTL=(kubectl --namespace="$NAMESPACE")

string() {  # as JSON, which YAML takes too
  local text="${1//\\/\\\\}"
  printf '"%s"' "${text//\"/\\\"}"
}

strings() {  # words as a list
  local word list=""
  for word in "$@"; do list+="${list:+, }$(string "$word")"; done
  echo "[$list]"
}

mapping() {  # the NAME=VALUE of words as a mapping of strings
  local pair map=""
  for pair in $1; do
    case "$pair" in
      ?*=?*) map+="${map:+, }$(string "${pair%%=*}"): $(string "${pair#*=}")" ;;
      *) fail "'$pair' in $2 is not NAME=VALUE" ;;
    esac
  done
  echo "{$map}"
}

render() {
  local text name key resources limits="" node_selector tolerations="" train
  read -ra train <<< "$TRAIN"
  resources="$(mapping "$RESOURCES" RESOURCES)" || exit 2
  node_selector="$(mapping "$NODE_SELECTOR" NODE_SELECTOR)" || exit 2
  for key in $RESOURCES; do  # devices can be asked for as limits only; cpu and memory are better left without
    case "$key" in */*) limits+=" $key" ;; esac
  done
  for key in $TOLERATE; do tolerations+="${tolerations:+, }{key: $(string "$key"), operator: Exists}"; done
  text="$(cat launch/kubernetes/service.yaml && echo --- && cat launch/kubernetes/job.yaml)" || exit 1
  fill() { text=${text//"\${$1}"/"$2"}; }
  fill RUN_NAME "$RUN_NAME"
  fill PROCESSES "$PROCESSES"
  fill CRASHES_OF_ALL "$((CRASHES * PROCESSES))"
  fill GRACE "$GRACE"
  fill IMAGE "$(string "$IMAGE")"
  fill RESOURCES "$resources"
  fill LIMITS "$(mapping "$limits" RESOURCES)"
  fill NODE_SELECTOR "$node_selector"
  fill TOLERATIONS "[$tolerations]"
  fill CLAIM "$(string "$CLAIM")"
  fill MOUNT "$(string "$MOUNT")"
  fill COMMAND "$(strings python -m vgpt_jax.main "${train[@]}")"
  echo "$text"
}

apply() {
  local text
  text="$(render)" || exit 2
  if [ "$dry_run" = yes ]; then
    printf "%s << 'YAML'\n%s\nYAML\n" "$(quoted "${KUBECTL[@]}" apply --filename=-)" "$text"
  else
    printf '%s\n' "$text" | "${KUBECTL[@]}" apply --filename=- ||
      fail "not applied: see above; a Job that is there cannot be changed: bash launch/kubernetes.sh delete, then apply"
  fi
}

logs() {
  local selector="job-name=$RUN_NAME,batch.kubernetes.io/job-completion-index=$1" pod=NEWEST
  local newest=(get pods --selector="$selector" --sort-by=.metadata.creationTimestamp --output=name)
  if [ "$dry_run" = yes ]; then
    run "${KUBECTL[@]}" "${newest[@]}"
  else
    pod="$("${KUBECTL[@]}" "${newest[@]}" | tail -n 1)"
    [ -n "$pod" ] || fail "there is no pod of process $1: bash launch/kubernetes.sh status"
  fi
  run "${KUBECTL[@]}" logs --follow --tail=100 "$pod"
}

image() {
  run docker build --file launch/kubernetes/Dockerfile --build-arg "EXTRA=$EXTRA" --tag "$IMAGE" . ||
    fail "the image could not be built: see above"
  run docker push "$IMAGE" || fail "the image could not be pushed: see above; is 'docker login' done?"
}

case "$RUN_NAME" in
  *[!a-z0-9-]* | [!a-z]* | *-) fail "RUN_NAME is '$RUN_NAME', but must be a small letter, then more, digits, or - inside" ;;
esac
[ ${#RUN_NAME} -le 50 ] || fail "RUN_NAME has ${#RUN_NAME} letters, but must have at most 50: the pods' names are longer"
check_number PROCESSES "$PROCESSES" 1
check_number CRASHES "$CRASHES"
check_number GRACE "$GRACE"
case "${1:-}" in
  image | render | apply) [ -n "$IMAGE" ] || fail "IMAGE is needed: where 'image' pushes it, and the pods get it" ;;
esac
case "${1:-}" in
  render | apply) [ -n "$CLAIM" ] || fail "CLAIM is needed: a PersistentVolumeClaim that all pods can write, for the workdir" ;;
esac
case "${1:-}" in
  image | render | apply) "$1" ;;
  status) run "${KUBECTL[@]}" get jobs,pods --selector="job-name=$RUN_NAME" ;;
  logs) logs "${2:-0}" ;;
  delete) run "${KUBECTL[@]}" delete "job/$RUN_NAME" "service/$RUN_NAME" --ignore-not-found ;;
  *) fail "bash launch/kubernetes.sh [--dry-run] image, render, apply, status, logs or delete, not '${1:-}'" ;;
esac
