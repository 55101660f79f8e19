#!/usr/bin/env bash
# The tables of docs/results from nothing: makes the data, trains the recipe with every seed, evaluates it.
#
#   bash launch/reproduce.sh [novels|code|icl|all] [options] [--section.key value ...]
#
#   --novels DIR         books as .txt, in train/ and validation/ (wanted by novels and icl)
#   --in-context DIR     labelled sets: SST-2, mr, subj, sst-5, mpqa (wanted by icl); `hub` downloads them
#   --squad FILE         SQuAD v1.1 or v2.0 to be asked about (icl)
#   --chapterbreak FILE  a ChapterBreak file (novels)
#   --seeds "1 2 3"      one run each; by default these three
#   --results DIR        where reports and plots are copied; by default docs/results
#   --limit N|small      items of each evaluation, as launch/evaluate.py has it
#   --backbone DIR       what launch/prepare_backbone.py made; by default it makes SmolLM2-135M-Instruct
#   --work DIR           folder of data (.cache/longmem) and runs (runs); by default this one
#
# Every other option goes to launch/train.py. Begun again, it goes on where it stopped: runs and evaluations that are
# finished are not done again.
set -euo pipefail
here="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "reproduce: $1" >&2; exit 2; }
say() { printf '\n== %s\n' "$1"; }
path_of() { # NAME VALUE KIND: the absolute path of what an option names
  [[ -n "$2" ]] || fail "$1 needs a path"
  local path
  path="$(cd "$here" && realpath -m -- "$2")"
  test "$3" "$path" || fail "$1 $2 is not there"
  echo "$path"
}

recipe="" novels="" in_context="" squad="" chapterbreak="" backbone="" work="$PWD"
seeds="1 2 3" results=docs/results overrides=() limit=()
while (($#)); do
  case "$1" in
    novels | code | icl | all) [[ -z "$recipe" ]] || fail "one recipe, or all: got $recipe and $1"; recipe="$1"; shift ;;
    --novels) novels="$(path_of "$1" "${2:-}" -d)"; shift 2 ;;
    --in-context)
      if [[ "${2:-}" == hub ]]; then in_context=hub; else in_context="$(path_of "$1" "${2:-}" -d)"; fi
      shift 2
      ;;
    --squad) squad="$(path_of "$1" "${2:-}" -f)"; shift 2 ;;
    --chapterbreak) chapterbreak="$(path_of "$1" "${2:-}" -f)"; shift 2 ;;
    --backbone) backbone="$(path_of "$1" "${2:-}" -d)"; shift 2 ;;
    --work) work="$(path_of "$1" "${2:-}" -d)"; shift 2 ;;
    --seeds) seeds="${2:-}"; [[ "$seeds" =~ ^[0-9]+(\ [0-9]+)*$ ]] || fail "--seeds needs numbers, such as \"1 2 3\""; shift 2 ;;
    --results) results="$(cd "$here" && realpath -m -- "${2:?--results needs a folder}")"; shift 2 ;;
    --limit) limit=(--limit "${2:?--limit needs a number, or small}"); shift 2 ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' launch/reproduce.sh; exit 0 ;;
    --run.output_dir* | --run.seed* | --backbone.path* | --data.path* | --data.sources*)
      fail "$1 is set here: see --work, --seeds and --backbone"
      ;;
    --*.*) overrides+=("$1" "${2:?$1 needs a value}"); shift 2 ;;
    *) fail "unknown option $1; --help tells what there is" ;;
  esac
done
recipe="${recipe:-all}"
wanted=("$recipe")
[[ "$recipe" == all ]] && wanted=(novels code icl)
for name in "${wanted[@]}"; do # before anything is made
  case "$name" in
    novels | icl) [[ -d "$novels/train" && -d "$novels/validation" ]] ||
      fail "$name wants --novels DIR with train/ and validation/ of .txt books (Project Gutenberg has them)" ;;&
    icl) [[ -n "$in_context" ]] || fail "icl wants --in-context DIR, or hub" ;;
  esac
done

bash launch/setup.sh
export TOKENIZERS_PARALLELISM=false
PATH="$PWD/.venv/bin:$PATH"
cache="$work/.cache/longmem"
ranks=2 # as launch/quickstart.sh
[[ "$(python -c 'import torch; print(torch.cuda.device_count())')" == 1 ]] && ranks=1
cores="$(nproc)"

store() { # NAME COMMAND...: a token store, if it is not there
  local made="$cache/$1.made" asked="${*:2} --tokenizer $backbone"
  if [[ ! -f "$cache/$1/store.json" ]]; then
    mkdir -p "$cache"
    echo "$asked" > "$made"
    "${@:2}" --tokenizer "$backbone" --output "$cache/$1"
  elif [[ "$(cat "$made" 2>/dev/null)" == "$asked" ]]; then
    echo "$cache/$1 is there"
  else
    fail "$cache/$1 was made of other data: remove it and the runs of it, or give another --work"
  fi
}
books() { store novels-data python launch/prepare_data.py "$novels/train" --validation "$novels/validation"; }
prepare() {
  case "$1" in
    novels) books ;;
    code)
      [[ -d "$cache/python-library" ]] || python tools/collect_stdlib.py --output "$cache/python-library"
      store code-data python launch/prepare_data.py "$cache/python-library" --validation-documents 16
      ;;
    icl)
      books
      local of_squad=()
      [[ -z "$squad" ]] || of_squad=(--squad "$squad" --squad-articles "$(first_article)")
      store icl-data python launch/prepare_demonstrations.py --in-context "$in_context" "${of_squad[@]}"
      ;;
  esac
}
first_article() { # [--as-list]: its title, which may hold commas
  python -c 'if True:
    import json, sys
    title = json.load(open(sys.argv[1], encoding="utf-8"))["data"][0]["title"]
    print(json.dumps([title]) if sys.argv[2:] else title)' "$squad" "$@"
}

train() { # RUN RECIPE SEED
  local port sources=(--data.path "$cache/$2-data")
  [[ "$2" != icl ]] || sources=(--data.sources "[{path: '$cache/icl-data'}, {path: '$cache/novels-data'}]")
  port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
  OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}" \
    deepspeed --num_gpus "$ranks" --master_port "$port" launch/train.py --config "configs/$2.yaml" \
    --backbone.path "$backbone" "${sources[@]}" --run.output_dir "$1" --run.seed "$3" "${overrides[@]}"
}
evaluate() { # RUN TASK OPTIONS...
  OMP_NUM_THREADS="${OMP_NUM_THREADS:-$cores}" python launch/evaluate.py --model "$1" --task "$2" "${limit[@]}" "${@:3}"
}
windows_of() { # RUN: those ordinary windows that its backbone has
  python -c 'if True:
    import json, sys, yaml
    run = yaml.safe_load(open(sys.argv[1] + "/config.yaml", encoding="utf-8"))
    backbone = json.load(open(sys.argv[2] + "/config.json", encoding="utf-8"))
    longest, wanted = backbone.get("max_position_embeddings") or 0, run["evaluation"].get("backbone_window_tokens")
    longest = longest if wanted is None else min(longest, wanted)
    print(",".join(str(n) for n in (512, 2048, 4096) if run["train"]["segment_tokens"] <= n <= longest))' "$1" "$backbone"
}
measure() { # RUN RECIPE: every task that its recipe is about
  local large=(--memory.tokens 65536) far=() windows
  windows="$(windows_of "$1")"
  [[ -z "$windows" ]] || far=(--backbone-windows "$windows")
  [[ "$2" != novels || "${limit[*]}" == *small ]] || far+=(--perplexity.context_tokens 65536)
  evaluate "$1" perplexity "${large[@]}" "${far[@]}" --memory-tokens 0,1024,4096,16384
  case "$2" in
    novels)
      evaluate "$1" recall "${large[@]}"
      [[ -z "$chapterbreak" ]] || evaluate "$1" chapterbreak "${large[@]}" --data "chapterbreak=$chapterbreak"
      ;;
    code) evaluate "$1" efficiency "${large[@]}" ;;
    icl)
      evaluate "$1" in_context "${large[@]}" --data "in_context=$in_context"
      [[ -z "$squad" ]] ||
        evaluate "$1" squad "${large[@]}" --data "squad=$squad" --squad.leave_out "$(first_article --as-list)"
      ;;
  esac
}

if [[ -z "$backbone" ]]; then
  say "backbone: SmolLM2-135M-Instruct"
  backbone="$cache/smollm2-135m"
  python launch/prepare_backbone.py --output "$backbone"
fi
for name in "${wanted[@]}"; do
  say "$name: data"
  prepare "$name"
  for seed in $seeds; do
    run="$work/runs/$name-$seed"
    say "$name, seed $seed: training"
    train "$run" "$name" "$seed"
    say "$name, seed $seed: evaluation"
    measure "$run" "$name"
    mkdir -p "$results/$name-$seed"
    cp "$run"/evaluation/*.png "$results/$name-$seed/"
    # What lies on this machine is nobody's business: names without their folders.
    sed -E 's#(^|[ :(`])/[^ )`]*/#\1#g' "$run/evaluation/report.md" > "$results/$name-$seed/report.md"
  done
done
say "reports and plots: $results"
