#!/usr/bin/env bash
# Runs several processes as one run on this machine's CPU, as they would on as many hosts.
#
#   bash launch/local_processes.sh [--dry-run] COUNT ARGUMENTS...      ARGUMENTS: what follows "python"
#   bash launch/local_processes.sh 2 -m vgpt_jax.main --config=configs/emoji.py --workdir=runs/two
#
# Each line that they print begins with the process's number. TERM and Ctrl-C are passed on to all as TERM. When one fails
# all are told to stop. The exit status is that of the first that failed, or 0: the same to launch/again.sh as one process's.
# A GPU or TPU host needs one process for all of its devices: there, run "python -m vgpt_jax.main" itself.
set -uo pipefail

INTERPRETER="${INTERPRETER:-}"              # a Python with the project installed; by default .venv, made if it is not there
GRACE="${GRACE:-90}"                        # seconds from TERM to KILL; a process misses a dead one after 60
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"

launch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$launch/dry_run.sh"
if [ "${1:-}" = --dry-run ]; then
  dry_run=yes
  shift
fi
check_number "the number of processes" "${1:-}" 1
check_number GRACE "$GRACE"
count="$1"
shift
[ $# -gt 0 ] || fail "nothing to run: bash launch/local_processes.sh $count -m vgpt_jax.main --config=... --workdir=..."
if [ -z "$INTERPRETER" ] && [ "$dry_run" = no ]; then
  INTERPRETER="$(source "$launch/environment.sh" && environment >&2 && echo "$python")" || exit 1
fi

while :; do  # a port on which nobody answers
  port=$((20000 + RANDOM % 12000))
  (: 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null || break
done

numbered() {  # each line with a process's number before it
  trap '' TERM INT HUP  # it ends with the process whose lines it reads
  local line
  while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$1" "$line"; done
}

processes=()  # those that run, by number
told=no
trap 'told=yes' TERM INT HUP
for ((i = 0; i < count; i++)); do
  variables=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$count" "JAX_PROCESS_ID=$i")
  if [ "$dry_run" = yes ]; then
    quoted "JAX_PLATFORMS=$JAX_PLATFORMS" "${variables[@]}" "${INTERPRETER:-$(dirname "$launch")/.venv/bin/python}" "$@"
    continue
  fi
  env "${variables[@]}" "$INTERPRETER" "$@" > >(numbered "$i") 2> >(numbered "$i" >&2) &
  processes[i]=$!
done

status=0
deadline=""
while [ ${#processes[@]} -gt 0 ]; do
  for i in "${!processes[@]}"; do
    kill -0 "${processes[i]}" 2> /dev/null && continue
    wait "${processes[i]}"
    ended=$?
    unset "processes[i]"
    if [ "$ended" -ne 0 ] && [ "$status" -eq 0 ]; then
      status=$ended
      echo "process $i ended with status $ended" >&2
    fi
  done
  [ ${#processes[@]} -gt 0 ] || break
  if [ -z "$deadline" ]; then
    if [ "$told" = yes ] || [ "$status" -ne 0 ]; then
      kill -TERM "${processes[@]}" 2> /dev/null
      deadline=$((SECONDS + GRACE))
    fi
  elif [ "$SECONDS" -ge "$deadline" ]; then
    kill -KILL "${processes[@]}" 2> /dev/null
  fi
  sleep 0.1
done
exit "$status"
