#!/usr/bin/env bash
# Runs every checker, one line each, with what it found if it found anything: bash launch/lint.sh
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH="$PWD/.venv/bin:$PATH"

status=0
check() {
  local name="$1" output
  shift
  if output="$("$@" 2>&1)"; then
    printf 'ok    %s\n' "$name"
  else
    printf 'FAIL  %s\n%s\n' "$name" "$output"
    status=1
  fi
}

check "ruff format" ruff format --check .
check "ruff check" ruff check .
check "mypy" mypy
check "import-linter" lint-imports
check "pydoclint" pydoclint --quiet pipeline eval launch tools
check "codespell" codespell
exit "$status"
