#!/usr/bin/env bash
# Sets up, trains configs/emoji.py on the embedded emoji (15 minutes of processor time), measures it, draws.
#
#   bash launch/quickstart.sh [DIR]     DIR: where everything goes, runs/emoji by default
#
# What is finished is not done again: a run that was interrupted goes on where it was.
set -euo pipefail
caller="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
workdir="${1:-runs/emoji}"
case "$workdir" in
  /*) ;;
  *) [ $# -eq 0 ] || workdir="$caller/$workdir" ;;
esac
environment

"$python" -m vgpt_jax.main --config=configs/emoji.py --workdir="$workdir"
if [ ! "$workdir/evaluation/table.md" -nt "$workdir/classifier/model/metadata.json" ]; then
  echo "measuring ..."
  "$python" -m vgpt_jax.evaluate --workdir "$workdir" > /dev/null
fi
if [ ! "$workdir/samples/emoji.json" -nt "$workdir/classifier/model/metadata.json" ]; then
  echo "drawing ..."
  "$python" -m vgpt_jax.sample --from_pretrained "$workdir" --cls_name smileys flags animals food people symbols \
    --accept_n 16 --temperature 0.9 --top_k 100 --top_p 0.95 --guidance 2 --view both --save_path "$workdir/samples/emoji.gif"
fi

echo
cat "$workdir/evaluation/table.md"
cat << TEXT

Pictures, in $workdir:
  evaluation/samples.png           emoji by class, each the best of 16
  samples/emoji.gif                the decoding: above what the decoder makes of the tokens so far, below the patches
  evaluation/reconstructions.png   held-out emoji (rows 1 and 3) and what the tokenizer makes of them (2 and 4)
  evaluation/curves.png            losses and metrics over training

Draw more:
  .venv/bin/python -m vgpt_jax.sample --from_pretrained $workdir --cls_name flags food --num 4 --seed 1
TEXT
