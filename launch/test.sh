#!/usr/bin/env bash
# Sets up, checks the code and runs the tests: bash launch/test.sh [pytest arguments, such as tests/unit -k bank]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh --dev

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Tests with several ranks would otherwise start (ranks x cores) threads.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

status=0
bash launch/lint.sh || status=1
if (($#)); then
  .venv/bin/python -m pytest "$@" || status=1
else
  # Tests of one process run beside each other; those that start ranks have the machine for themselves.
  .venv/bin/python -m pytest tests/unit --numprocesses auto --dist loadfile || status=1
  .venv/bin/python -m pytest tests/distributed tests/end_to_end --durations 25 || status=1
fi
exit "$status"
