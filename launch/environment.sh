# Sourced by the other scripts: makes .venv in the repository's root and installs the project into it, once.
#
#   environment EXTRA     EXTRA: "" or an extra of pyproject.toml, such as "test"
#
# Afterwards $python is the environment's interpreter, and the working directory is the repository's root.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or later is needed; set PYTHON to where it is" >&2
  return 1
}

environment() {
  local extra="${1:-}" stamp wanted base
  if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then  # not there, or left half made
    base="$(find_python)" || exit 1
    echo "making .venv with $("$base" --version)"
    "$base" -m venv --clear .venv || exit 1
  fi
  python="$PWD/.venv/bin/python"
  stamp=".venv/installed-${extra:-base}"
  wanted="$(cksum < requirements.txt) $(cksum < pyproject.toml)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing the project${extra:+ with [$extra]} (a minute or two)"
    "$python" -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}" || exit 1
    echo "$wanted" > "$stamp"
  fi
}
