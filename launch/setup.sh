#!/usr/bin/env bash
# Makes .venv in the repository, with everything that LongMem needs, and nothing else:
#
#   bash launch/setup.sh [--dev] [--gpu]
#
#   --dev   also what launch/test.sh needs
#   --gpu   Faiss for NVIDIA GPUs instead of CPUs; remembered by the .venv
#
# PYTHON=/path/to/python chooses the interpreter (3.10 or newer; default: python3, or a newer one beside it).
# A machine without a GPU saves gigabytes with PyTorch's CPU wheels:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash launch/setup.sh
#
# Run again, it finds a stamp in .venv and ends at once, without network. What was interrupted is repaired; two at once take turns.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  printf 'setup: %s\n' "$@" >&2
  exit 1
}

dev=false
gpu=false
for argument in "$@"; do
  case "$argument" in
    --dev) dev=true ;;
    --gpu) gpu=true ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' launch/setup.sh; exit 0 ;;
    *) fail "unknown option $argument" "expected: --dev, --gpu" ;;
  esac
done
if [[ -e .venv/longmem-gpu ]]; then gpu=true; fi
if $gpu; then requirements=requirements-gpu.txt; else requirements=requirements.txt; fi

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

choose_python() {
  if [[ -n "${PYTHON:-}" ]]; then
    is_recent "$PYTHON" || fail "PYTHON=$PYTHON does not run, or is older than 3.10" "do: give the path of Python 3.10 or newer"
    echo "$PYTHON"
    return
  fi
  local candidate
  for candidate in .venv/bin/python python3 python3.13 python3.12 python3.11 python3.10; do
    if is_recent "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.10 or newer was found" "do: install one (Debian, Ubuntu: apt-get install python3 python3-venv)," \
    "    or name one: PYTHON=/path/to/python bash launch/setup.sh"
}

# Everything that decides what .venv holds. A .venv cannot be moved, so its place counts too.
print_stamp() {
  echo "$PWD"
  "$python" -c 'import sys; print(sys.version)'
  sha256sum "$requirements" requirements-backbone.txt constraints.txt launch/setup.sh
}

is_ready() {
  [[ -x .venv/bin/python ]] && ! [[ -e .venv/longmem-unfinished ]] &&
    [[ "$(cat .venv/longmem-stamp 2>/dev/null)" == "$stamp" ]] &&
    { ! $dev || [[ "$(cat .venv/longmem-stamp-dev 2>/dev/null)" == "$(sha256sum requirements-dev.txt requirements-lm-eval.txt)" ]]; }
}

check_machine() {
  command -v gcc >/dev/null || fail "gcc was not found; DeepSpeed compiles parts of itself when it first runs" \
    "do: install it (Debian, Ubuntu: apt-get install build-essential)"
  "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python has no venv module" \
    "do: install it (Debian, Ubuntu: apt-get install python3-venv)"
  command -v c++ >/dev/null || echo "setup: hint: no C++ compiler; DeepSpeed's optional operators want one (apt-get install g++)"
  "$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    echo "setup: hint: no Python.h; DeepSpeed's optional operators want it (apt-get install python3-dev)"
  command -v mpirun >/dev/null ||
    echo "setup: hint: no MPI library; only starting with mpirun needs one (apt-get install openmpi-bin)"
}

make_venv() {
  # An interrupted pip may leave a package that it can neither use nor remove, and a copied or re-based .venv points elsewhere.
  local home=""
  home="$(sed -n 1p .venv/longmem-stamp 2>/dev/null || true)"
  if [[ -e .venv/longmem-unfinished || ( -n "$home" && "$home" != "$PWD" ) ]] || ! .venv/bin/python -m pip --version &>/dev/null ||
    [[ "$(.venv/bin/python -c 'import sys; print(sys.version)')" != "$("$python" -c 'import sys; print(sys.version)')" ]]; then
    # The base interpreter, because .venv/bin/python cannot clear the folder that it lives in.
    local base
    base="$("$python" -c 'import sys; print(sys._base_executable)')"
    echo "setup: making .venv with $("$base" --version)"
    "$base" -m venv --clear .venv
  fi
  : >.venv/longmem-unfinished
  rm -f .venv/longmem-stamp .venv/longmem-stamp-dev
}

install() {
  .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt "$@"
}

install_all() {
  # DeepSpeed's set-up looks for torch; its operators are compiled when first used, not here.
  export DS_BUILD_OPS=0
  install torch
  if $gpu; then .venv/bin/python -m pip uninstall --yes faiss-cpu; fi
  install -r "$requirements"
  install --no-deps -r requirements-backbone.txt
  if $dev; then install -r requirements-dev.txt -r requirements-lm-eval.txt; fi
  # `pipeline` and `eval` can be imported from anywhere.
  echo "$PWD" >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/longmem.pth"
}

main() {
  python="$(choose_python)"
  stamp="$(print_stamp)"
  if is_ready; then return; fi
  # The lock is on this script: the only place that is sure to exist and is not cleared with .venv.
  exec 9<>launch/setup.sh
  flock --nonblock 9 || { echo "setup: another set-up is running here; waiting for it"; flock 9; }
  python="$(choose_python)"
  stamp="$(print_stamp)"
  if is_ready; then return; fi
  check_machine
  make_venv
  install_all
  if $gpu; then : >.venv/longmem-gpu; fi
  print_stamp >.venv/longmem-stamp
  if $dev; then sha256sum requirements-dev.txt requirements-lm-eval.txt >.venv/longmem-stamp-dev; fi
  rm .venv/longmem-unfinished
  echo "setup: .venv is ready"
}

main
