#!/usr/bin/env bash
# The main job in small, from nothing: sets up, prepares backbone and data, trains LongMem, evaluates on held-out documents.
#
#   bash launch/quickstart.sh [--text DIR] [--run.output_dir DIR] [--section.key value ...]
#
#   --text DIR   a folder of .txt books instead of the Python library's own sources; an eighth of them is held out
#
# Every other option goes to launch/train.py. Run again, it goes on where it stopped, or shows what it found.
set -euo pipefail
here="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cache=.cache/longmem
data=$cache/quickstart-data
text=""
overrides=()
while (($#)); do
  case "$1" in
    --text)
      [[ -n "${2:-}" ]] || { echo "quickstart: --text needs a folder of .txt files" >&2; exit 2; }
      text="$(cd "$here" && cd "$2" 2>/dev/null && pwd)" || { echo "quickstart: --text $2 is not a folder" >&2; exit 2; }
      [[ -n "$(find "$text" -name '*.txt' -print -quit)" ]] || { echo "quickstart: --text $2 has no .txt files" >&2; exit 2; }
      shift 2
      ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' launch/quickstart.sh; exit 0 ;;
    *) overrides+=("$1"); shift ;;
  esac
done

bash launch/setup.sh
export TOKENIZERS_PARALLELISM=false
PATH="$PWD/.venv/bin:$PATH"

say() { printf '\n== %s\n' "$1"; }

say "backbone: SmolLM2-135M-Instruct"
python launch/prepare_backbone.py --output $cache/smollm2-135m

say "data"
if [[ -n "$text" ]]; then
  # One store for each folder as it is now: other or changed books make another one.
  mark="$(cd "$text" && find "$PWD" -name '*.txt' -printf '%p %s %T@\n' | sort | sha256sum | cut -c1-12)"
  data="$cache/text-$mark"
  overrides=(--data.path "$data" --run.output_dir "runs/quickstart-$mark" "${overrides[@]}")
  held_out="$(find "$text" -name '*.txt' | wc -l)"
  held_out=$(((held_out + 7) / 8))
  input="$text"
else
  held_out=8
  input=$cache/python-library
  [[ -d $input ]] || python tools/collect_stdlib.py --output $input
fi
if [[ -f $data/store.json ]]; then
  echo "$data is there"
else
  python launch/prepare_data.py "$input" --tokenizer $cache/smollm2-135m --output "$data" \
    --validation-documents "$((held_out < 2 ? 2 : held_out))"
fi

say "training"
# Two ranks, whatever the machine, unless it has exactly one GPU; their threads share the cores.
ranks=2
[[ "$(python -c 'import torch; print(torch.cuda.device_count())')" == 1 ]] && ranks=1
cores="$(nproc)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}"
port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
exec deepspeed --num_gpus "$ranks" --master_port "$port" launch/train.py --config configs/quickstart.yaml "${overrides[@]}"
