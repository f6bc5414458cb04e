# Sourced by the launchers: how they run a command or, with --dry-run, print it, and how they say what is wrong.
#
#   run WORD...                      runs the command; where dry_run is "yes" prints it, as a line of shell
#   quoted WORD...                   the words as one line of shell
#   say TEXT...                      a line of progress, a comment in a dry run
#   fail TEXT...                     one line on standard error; the script exits with status 2
#   check_number NAME VALUE [LEAST]  fails unless the value is a whole number of at least LEAST, 0 by default
#   check_word NAME VALUE WORD...    fails unless the value is one of the words

dry_run="${dry_run:-no}"

quoted() {
  local word line="" unsafe='[^A-Za-z0-9_@%+=:,./-]' mark="'\\''"
  for word in "$@"; do
    if [ -z "$word" ] || [[ $word =~ $unsafe ]]; then
      word="'${word//\'/$mark}'"
    fi
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

run() {
  if [ "$dry_run" = yes ]; then
    quoted "$@"
  else
    "$@"
  fi
}

say() {
  if [ "$dry_run" = yes ]; then
    echo "# $*"
  else
    echo "$*"
  fi
}

fail() {
  echo "error: $*" >&2
  exit 2
}

check_number() {
  case "$2" in
    '' | *[!0-9]* | ??????????*) ;;
    *) [ "$2" -lt "${3:-0}" ] || return 0 ;;
  esac
  fail "$1 is '$2', but must be a whole number of at least ${3:-0}"
}

check_word() {
  local name="$1" value="$2" word
  shift 2
  for word in "$@"; do
    [ "$value" != "$word" ] || return 0
  done
  fail "$name is '$value', but must be one of: $*"
}
