#!/usr/bin/env bash
# Everything a GPU can tell us, in parts that fit into runs of at most ten minutes: each measurement in a
# process and a time box of its own, what it finds in JSON as it goes, so that a hang or an early end
# costs that measurement alone. Needs no network, installs nothing, and needs no git.
#
#   OUT=folder benchmarks/gpu.sh [--part NAME,...] [--seconds N] [--dry-run]
#
#   OUT         folder for the results, at most 8 files with log.txt; benchmarks/results by default
#   PYTHON      interpreter; python3 by default
#   --part      of correctness, steps, peers, tune, sweep, mnist, streams, history, input; all but
#               the last three by default
#   --seconds   for all of it; 570 by default. What has no time left says so
#   --dry-run   the same commands on the CPU with tiny budgets, to see that they run
#
# Caches lie in GPU_CACHES where that is set, so that a second run on the machine finds them warm.
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT" || exit 1
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
ALL=correctness,steps,peers,tune,sweep,mnist
PARTS=$ALL
BUDGET=570
DRY=0
FAILED=0
SHOWN=60 # lines of what a step says

usage() {
    sed -n '2,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

while (($#)); do
    case $1 in
    --part)
        PARTS=${2:-}
        shift
        ;;
    --seconds)
        BUDGET=${2:-}
        shift
        ;;
    --dry-run) DRY=1 ;;
    *) usage ;;
    esac
    shift || usage
done
[[ $BUDGET =~ ^[1-9][0-9]*$ && -n $PARTS ]] || usage
for part in ${PARTS//,/ }; do
    [[ ,$ALL,streams,history,input, == *",$part,"* ]] || usage
done

mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
export XLA_PYTHON_CLIENT_PREALLOCATE=false
if [[ -n ${GPU_CACHES:-} ]]; then
    CACHES=$GPU_CACHES
else
    CACHES=$(mktemp -d) || exit 1
    trap 'rm -rf "$CACHES"' EXIT
fi
# What the tuner finds reaches everything behind it through them.
export GRAPHNET_CACHE_DIR=$CACHES/graphnet TRITON_CACHE_DIR=$CACHES/triton
export TORCHINDUCTOR_CACHE_DIR=$CACHES/inductor
# A copy of the checkout may bring the data along.
[[ -z ${GRAPHNET_DATA:-} && -d $ROOT/data/mnist ]] && export GRAPHNET_DATA=$ROOT/data

if ((DRY)); then
    TARGET=cpu
    BUDGET=3600 # a CPU may be slow and busy; what is small here is the work
elif "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    TARGET=cuda
else
    echo "gpu.sh: $PYTHON with torch sees no GPU here; --dry-run shows what would run" >&2
    exit 1
fi
has() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

LOG=$OUT/log.txt
say() { echo "$@" | tee -a "$LOG"; }

# step SECONDS WHAT COMMAND...: runs it, but no longer than that, nor than what is left of all.
# A bench that is stopped prints and keeps what it has. All it says is in the log, its end here: no
# pipe, which what a killed command has left running would hold open.
step() {
    local most=$1 what=$2 left=$((BUDGET - SECONDS)) size
    shift 2
    STATUS=0
    ((DRY || most > left)) && most=$left
    if ((most < 10)); then
        say "== $what: skipped, no time left"
        return
    fi
    say "== $what, at most $most s (at second $SECONDS)"
    size=$(wc -c <"$LOG")
    timeout --kill-after=5 "$most" "$@" >>"$LOG" 2>&1
    STATUS=$?
    tail -c "+$((size + 1))" "$LOG" | tail -n "$SHOWN"
    case $STATUS in
    0) ;;
    124 | 137 | 143) say "== $what: cut off; what it had measured is in $OUT" ;;
    *)
        say "== $what: failed ($STATUS)"
        FAILED=1
        ;;
    esac
}

# All kernels of these workloads, compiled in parallel: MODEL:BATCH:PRECISION[:STREAMS]...
warm() {
    ((DRY)) && return
    local jobs=() work model batch precision streams
    for work in "$@"; do
        IFS=: read -r model batch precision streams <<<"$work"
        timeout --kill-after=5 90 "$PYTHON" benchmarks/steps.py "$model" --batch "$batch" \
            --precision "$precision" --target "$TARGET" --warm \
            ${streams:+--streams "$streams"} >>"$LOG" 2>&1 &
        jobs+=($!)
    done
    wait "${jobs[@]}"
    say "== warmed $* (at second $SECONDS)"
}

# Warps that wait for one another may wait for ever: these kernels are tried first and alone. Where they
# do not hold, nothing behind this chooses them.
gluon() {
    ((DRY)) && return
    step 60 "gluon" "$PYTHON" -m pytest -q -x -p no:cacheprovider ${PARALLEL[@]+"${PARALLEL[@]}"} \
        tests/gpu/test_gluon.py
    ((STATUS)) || return
    export GRAPHNET_DISABLE=gluon_rows,gluon_pairs,gluon_resident
    say "== gluon: left out from here on, GRAPHNET_DISABLE=$GRAPHNET_DISABLE"
}

correctness() {
    local first=(tests/gpu/test_{parity,step,kernels}.py) rest=() file
    PARALLEL=()
    ((DRY)) || { has xdist && PARALLEL=(-n 12); }
    gluon
    # Whole steps first: they say most in the first minute.
    for file in tests/gpu/test_*.py; do
        [[ " ${first[*]} " == *" $file "* ]] && continue
        [[ $file == */test_gluon.py && -n ${GRAPHNET_DISABLE:-} ]] || rest+=("$file")
    done
    OMP_NUM_THREADS=2 step 200 "gpu tests" "$PYTHON" -m pytest -q -p no:cacheprovider \
        -p benchmarks.record --record "$OUT" ${PARALLEL[@]+"${PARALLEL[@]}"} \
        "${first[@]}" ${rest[@]+"${rest[@]}"}
}

steps() { # SECONDS MODEL BATCHES PRECISION OPTION...
    local most=$1 model=$2 batch=$3 precision=$4
    shift 4
    local options=("$@" --target "$TARGET" --json "$OUT")
    ((DRY)) && batch=2 precision=fp32 options+=(--seconds 0.1)
    step "$most" "steps $model b$batch $precision" "$PYTHON" benchmarks/steps.py "$model" \
        --batch "$batch" --precision "$precision" "${options[@]}"
}

step_times() {
    warm alexnet:128:bf16 alexnet:128:tf32 lenet5:128:fp32 lenet5:128:bf16
    steps 90 alexnet 128 bf16 --beside --cold
    steps 60 lenet5 128 fp32 --beside --cold
    ((DRY)) && return # the same twice
    steps 40 alexnet 128 tf32 --beside
    steps 30 lenet5 128 bf16 --beside
}

streams() { # what runs beside what: the updates of fully connected layers
    local all=0,1,16,32,48 model=alexnet precision
    ((DRY)) && model=lenet5
    for precision in bf16 tf32; do
        ((DRY)) || warm "$model:128:$precision:$all"
        steps 100 "$model" 128 "$precision" --streams "$all" --no-launches --seconds 8
        ((DRY)) && return # the same twice
    done
}

sweep() {
    ((DRY)) && return # it is `steps` with other numbers
    local batches=(32 64 256 512 1024) work=() batch
    for batch in "${batches[@]}"; do work+=("alexnet:$batch:bf16"); done
    warm "${work[@]}"
    steps 75 alexnet "$(IFS=,; echo "${batches[*]}")" bf16 --beside --no-launches --seconds 3
}

bench() { # SECONDS MODEL BATCH PRECISION OPTION...
    local most=$1 model=$2 batch=$3 precision=$4
    shift 4
    local options=("$@" --target "$TARGET" --json "$OUT")
    if ((DRY)); then
        batch=1 precision=fp32
        [[ $model == lenet5 ]] && precision=bf16 # the small one has more variants
        options+=(--rounds 1 --seconds 0.1 --parity 1 --against eager,eager-graph)
    fi
    step "$most" "bench $model b$batch $precision" "$PYTHON" -m graphnet bench "$model" \
        --batch "$batch" --precision "$precision" "${options[@]}"
}

peers() {
    local all=eager,eager-graph,compile
    bench 110 lenet5 128 fp32 --against $all --quick --seconds 6 --ablate fusion,cudagraph
    # max-autotune comes last and takes minutes: cut off, it leaves the others.
    bench 240 alexnet 128 bf16 --against $all,compile-max --quick --seconds 12
    if has jax; then
        ((DRY)) || step 120 "jax" "$PYTHON" benchmarks/jax_peer.py --seconds 100 --json "$OUT"
    else
        say "== jax: skipped, it is not installed"
    fi
}

tune() { # SECONDS MODEL PRECISION
    local most=$1 model=$2 precision=$3 options
    options=(--train --batch 128 --target cuda --seconds $((most - 20)))
    if ((DRY)); then # interpreted, others take minutes
        model=lenet5 precision=fp32 options=(--infer --batch 1 --target interpret --seconds 0.1)
    fi
    step "$most" "tune $model $precision" "$PYTHON" -m graphnet tune "$model" \
        --precision "$precision" "${options[@]}" --out "$OUT"
}

mnist() {
    if ((DRY)); then
        step 60 "LeNet-5 on digits" "$PYTHON" benchmarks/mnist99.py --target cpu --data digits \
            --epochs 1 --seeds 0 --json "$OUT"
    elif [[ -n ${GRAPHNET_DATA:-} ]]; then
        step 90 "LeNet-5 to 99 %" "$PYTHON" benchmarks/mnist99.py --target cuda --seeds 0-9 \
            --batch 128,192,256 --json "$OUT"
    else
        say "== LeNet-5 to 99 %: skipped, GRAPHNET_DATA names no folder with MNIST"
    fi
}

published() { # what others published, on the same work
    bench 60 alexnet_owt 128 bf16 --no-update --no-dropout --against eager,eager-graph --seconds 6
    bench 60 benchmarks/nets.py:kernelbench_alexnet 1024 tf32 --infer --against eager --seconds 6
}

input() { # image files on the way to the step, and the step alone
    local options=(--train --json "$OUT")
    if ((DRY)); then
        options+=(--images 64 --batch 32 --epochs 1 --rounds 1)
    else
        warm alexnet:128:bf16
        options+=(--images 8192 --epochs 5 --rounds 3)
    fi
    step 150 "image files to a training step" "$PYTHON" benchmarks/input_pipeline.py "${options[@]}"
}

asked() { [[ ,$PARTS, == *",$1,"* ]]; }
asked correctness && correctness
asked steps && step_times
asked peers && peers
asked tune && tune 150 alexnet bf16
asked sweep && sweep
asked mnist && mnist
asked streams && streams
asked history && published
asked input && input
say "== done at second $SECONDS; results in $OUT: $(cd "$OUT" && echo *)"
exit $FAILED
