#!/usr/bin/env bash
# Runs a command, and runs it again for as long as that can help.
#
#   bash launch/again.sh [--dry-run] COMMAND...      python -m vgpt_jax.main --config=configs/emoji.py --workdir=runs/emoji
#
# How the command ended      what follows
#   0                        done: the end
#   2                        something that a person has to mend, said on standard error: the end
#   75                       it was told to stop and saved: at once again, or the end (ON_75)
#   126, 127                 it cannot be run: the end
#   anything else            a crash: again after a pause, so often as CRASHES says
#
# A TERM, INT or HUP is passed on as TERM, and nothing is started again after it. The exit status is the last run's.
set -uo pipefail

CRASHES="${CRASHES:-5}"   # crashes in a row after each of which it is tried again
PAUSE="${PAUSE:-10}"      # seconds before the next try; twice as many after each further crash in a row, at most 300
STEADY="${STEADY:-600}"   # a run that lasted so many seconds begins a new row of crashes
ON_75="${ON_75:-again}"   # again, or end: where a scheduler starts the whole job anew

source "$(dirname "${BASH_SOURCE[0]}")/dry_run.sh"
if [ "${1:-}" = --dry-run ]; then
  dry_run=yes
  shift
fi
[ $# -gt 0 ] || fail "no command: bash launch/again.sh [--dry-run] COMMAND..."
check_number CRASHES "$CRASHES"
check_number PAUSE "$PAUSE"
check_number STEADY "$STEADY"
check_word ON_75 "$ON_75" again end
if [ "$dry_run" = yes ]; then
  run "$@"
  exit
fi

child=""        # what is waited for: the command, or a pause
told=no         # whether a signal said that this is to end
interrupted=no  # whether the last wait was cut short by one

pass_on() {
  told=yes
  interrupted=yes
  [ -z "$child" ] || kill -TERM "$child" 2> /dev/null
}
trap pass_on TERM INT HUP

once() {  # runs a command to its end; sets status
  "$@" &
  child=$!
  [ "$told" = no ] || kill -TERM "$child" 2> /dev/null  # it came before child was known
  while :; do
    interrupted=no
    wait "$child"
    status=$?
    [ "$interrupted" = yes ] || break
  done
  child=""
}

crashes=0
while :; do
  begun=$SECONDS
  once "$@"
  [ "$told" = no ] || exit "$status"
  case "$status" in
    0 | 2 | 126 | 127) exit "$status" ;;
    75)
      [ "$ON_75" = again ] || exit 75
      echo "again: it was told to stop, and goes on" >&2
      crashes=0
      continue
      ;;
  esac
  [ $((SECONDS - begun)) -lt "$STEADY" ] || crashes=0
  crashes=$((crashes + 1))
  if [ "$crashes" -gt "$CRASHES" ]; then
    echo "again: crash $crashes in a row (status $status): that is the end" >&2
    exit "$status"
  fi
  pause=$PAUSE
  for ((i = 1; i < crashes && pause < 300; i++)); do pause=$((2 * pause)); done
  [ "$pause" -le 300 ] || pause=300
  echo "again: crash $crashes in a row of at most $CRASHES (status $status): once more in $pause s" >&2
  crashed=$status
  once sleep "$pause"
  [ "$told" = no ] || exit "$crashed"
done
