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
  # Each core takes file after file. Those with ranks need two gigabytes each: four at once will do.
  cores="$(env -u OMP_NUM_THREADS nproc)"  # which takes that for the number of cores
  .venv/bin/python -m pytest tests/unit --dist loadfile --numprocesses "$cores" || status=1
  .venv/bin/python -m pytest tests/distributed tests/end_to_end --dist loadfile --no-loadscope-reorder \
    --numprocesses $((cores < 4 ? cores : 4)) --durations 25 || status=1
fi
exit "$status"
