#!/usr/bin/env bash
# Sets up, checks the style, runs the tests. Arguments go to pytest: bash launch/test.sh tests/quantizers -k cosine
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment test
if ! "$python" -c 'import importlib.metadata as m; m.version("lpips")' 2> /dev/null; then
  # Without its dependencies: torchvision has no build for torch's CPU wheel, and transformers breaks where it is installed.
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps lpips==0.1.4
fi
"$python" -m ruff check --quiet .
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"  # two processes: most of the time goes into compiling, on one core
