#!/usr/bin/env bash
# Sets up, checks the style, runs the tests. Arguments go to pytest: bash launch/test.sh tests/quantizers -k cosine
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment test
"$python" -m ruff check --quiet .
exec "$python" -m pytest "$@"
