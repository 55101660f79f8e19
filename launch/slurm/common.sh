# Shared by the job scripts beside it: one task a GPU through srun, and what is done when they end. Nothing to edit here.
#
#   train CONFIG RUN [SETTING...]    trains; requeues the job until train.steps is reached
#   sweep CONFIG RUN [SETTING...]    trains in RUN/N with the settings in SWEEP[N], N being the number in the array
#   evaluate MODEL [ARGUMENT...]     evaluates a run, a checkpoint or an export; goes on from the items that are done
#
# They read CONTAINER and MOUNTS of the script. After every attempt a line is written to RUN.attempts.

# The interpreter of the tasks where there is no container.
PYTHON="${PYTHON:-.venv/bin/python}"
# Attempts in a row without a newer checkpoint, after which a run is given up.
MAX_ATTEMPTS="${MAX_ATTEMPTS:-3}"
# Seconds that the other tasks have to end by themselves once the first has ended.
LAST_S="${LAST_S:-120}"
# What launch/train.py exits with when it has stopped on a signal, saved, and wants to be started again.
UNFINISHED=75

cd "$SLURM_SUBMIT_DIR" || exit 1

train() {
  local config="$1" run="$2" code
  shift 2
  # What run.resume names is where a job begins; its later attempts go on from what they have saved since.
  if ((${SLURM_RESTART_COUNT:-0} > 0)) && [[ -f "$run/checkpoints/latest" ]]; then set -- "$@" --run.resume auto; fi
  start launch/train.py --config "$config" --run.output_dir "$run" "$@"
  code=$?
  go_on "$run" "$code"
}

sweep() {
  local config="$1" run="$2/$SLURM_ARRAY_TASK_ID" settings="${SWEEP[SLURM_ARRAY_TASK_ID]:-}"
  shift 2
  [[ -n "$settings" ]] ||
    fail "SWEEP has no entry $SLURM_ARRAY_TASK_ID, only 0 to $((${#SWEEP[@]} - 1))" "do: mend #SBATCH --array"
  # Unquoted: a line of SWEEP is several words.
  # shellcheck disable=SC2086
  train "$config" "$run" $settings "$@"
}

evaluate() {
  local model="$1"
  shift
  start launch/evaluate.py --model "$model" "$@"
}

# Runs a Python program in every task, and returns the highest of their exit codes.
start() {
  say "attempt $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST: $*"
  local interrupted=false code tasks
  # A job that SLURM takes back gets SIGTERM, tasks and this shell alike. The tasks save; the shell waits for them.
  trap 'interrupted=true' TERM
  started="$(date +%s)"
  # One task that ends early must not have the others killed: they save, or say why they fail.
  run_in_container "$@"
  srun --kill-on-bad-exit=0 --wait="$LAST_S" "${command[@]}" &
  tasks=$!
  while :; do
    interrupted=false
    wait "$tasks"
    code=$?
    # The signal ends `wait`, not srun.
    if ! $interrupted || ((code <= 128)); then return "$code"; fi
  done
}

# Sets `command` to srun's options and words for a Python program, in the container if there is one. The environment
# goes with it: srun and apptainer pass all of it, pyxis lets the image's own variables win but for those named.
run_in_container() {
  case "${CONTAINER:-}" in
    "") command=("$PYTHON" "$@") ;;
    *.sif) command=(apptainer exec --nv --pwd "$PWD" --bind "$PWD${MOUNTS:+,$MOUNTS}" "$CONTAINER" python "$@") ;;
    *)
      local names
      names="$(compgen -e | grep -E '^(NCCL|HF|TORCH|GLOO|UCX|FI|OMP|CUDA|TOKENIZERS|MASTER)_' | paste -sd, -)"
      command=(--container-image="$CONTAINER" --container-mounts="$PWD:$PWD${MOUNTS:+,$MOUNTS}"
        --container-workdir="$PWD" ${names:+--container-env="$names"} python "$@")
      ;;
  esac
}

# Decides what comes after an attempt: the end of the job, or another one.
go_on() {
  local run="$1" code="$2" checkpoint
  checkpoint="$(cat "$run/checkpoints/latest" 2>/dev/null || echo none)"
  mkdir -p "$(dirname "$run")"
  if ((code == 0)); then
    note "$run" "$checkpoint" "exit code 0: done"
    exit 0
  fi
  # scancel, preemption and `scontrol requeue`: SLURM is already doing what was asked of it. A time limit is left to us.
  if ! is_ours; then
    note "$run" "$checkpoint" "exit code $code: SLURM has taken the job back"
    exit "$code"
  fi
  # A run that fails by itself ends with 1 or 2 on every task: it would fail again. Above 128 a task was killed. srun
  # knows no exit code of tasks on a lost node, which SLURM may give up minutes later (SlurmdTimeout): the others say it.
  if ((code != UNFINISHED && code <= 128)) && ! has_lost_a_rank "$run"; then
    note "$run" "$checkpoint" "exit code $code: failed, not requeued"
    exit "$code"
  fi
  if (($(fruitless "$run" "$checkpoint") >= MAX_ATTEMPTS)); then
    note "$run" "$checkpoint" "exit code $code: given up, $MAX_ATTEMPTS attempts without a newer checkpoint"
    exit "$code"
  fi
  note "$run" "$checkpoint" "exit code $code: requeued"
  scontrol requeue "$(job)"
}

# Whether this attempt has said that a rank was lost.
has_lost_a_rank() {
  local said_at
  said_at="$(stat -c %Y "$1/status.json" 2>/dev/null)" && ((said_at >= started)) &&
    grep -q '"reason": .*died or fell silent' "$1/status.json"
}

# Whether the job is still this script's own to end or to requeue.
is_ours() {
  local about
  about="$(scontrol show --oneliner job "$(job)")"
  [[ "$about" == *" JobState=RUNNING "* || "$about" == *" Reason=TimeLimit "* ]]
}

# How many attempts of this job in a row, this one among them, have ended without a newer checkpoint than the one before.
fruitless() {
  local run="$1" checkpoint="$2"
  {
    grep -F " job=$(job) " "$run.attempts" 2>/dev/null | grep -v "SLURM has taken the job back"
    echo "- - - checkpoint=$checkpoint"
  } | awk 'BEGIN { before = "checkpoint=none" } { count = $4 == before ? count + 1 : 0; before = $4 } END { print count }'
}

# Adds a line on this attempt to RUN.attempts: time, job, nodes, newest checkpoint, what was decided.
note() {
  local run="$1" checkpoint="$2" decision="$3"
  echo "$(date -u +%FT%TZ) job=$(job) nodes=$SLURM_JOB_NODELIST checkpoint=$checkpoint $decision" >>"$run.attempts"
  say "$decision (newest checkpoint: $checkpoint; status: $(said "$run" state))"
}

# What the run has said of itself in status.json, such as its `state`: running, finished, preempted or failed.
said() {
  local value
  value="$(sed -n "s/.*\"$2\": *\"\{0,1\}\([^\",]*\).*/\1/p" "$1/status.json" 2>/dev/null)"
  echo "${value:-unknown}"
}

# The job as squeue names it; SLURM_JOB_ID alone would be all of an array for one of its tasks.
job() { echo "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"; }

say() { echo "longmem: $(date -u +%FT%TZ) job $(job): $*"; }

fail() {
  printf 'longmem: %s\n' "$@" >&2
  exit 1
}
