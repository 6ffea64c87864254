#!/usr/bin/env bash
# Everything a GPU can tell us, in under nine minutes: the gpu tests in order of value, the tuner at
# the headline batches, the benches. Each step writes small JSON files as it goes, so being cut off
# loses nothing that was measured. Needs no network and installs nothing.
#
#   OUT=folder benchmarks/gpu.sh [--part correctness|tune|bench] [--dry-run]
#
#   OUT         folder for the results; benchmarks/results by default
#   PYTHON      interpreter; python3 by default
#   --part      one part only
#   --dry-run   the same commands on the CPU with tiny budgets, to see that they run
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT" || exit 1
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
BUDGET=525 # seconds in all
PART=all
DRY=0
FAILED=0

usage() {
    sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

while (($#)); do
    case $1 in
    --part)
        PART=${2:-}
        shift
        ;;
    --dry-run) DRY=1 ;;
    *) usage ;;
    esac
    shift
done
case $PART in all | correctness | tune | bench) ;; *) usage ;; esac

mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
# Fresh caches: cold times are cold. What the tuner finds reaches the benches through them.
CACHES=$(mktemp -d) || exit 1
trap 'rm -rf "$CACHES"' EXIT
export GRAPHNET_CACHE_DIR=$CACHES/graphnet TRITON_CACHE_DIR=$CACHES/triton
export TORCHINDUCTOR_CACHE_DIR=$CACHES/inductor

if ((DRY)); then
    TARGET=cpu
    BUDGET=3600 # a CPU may be slow and busy; what is small here is the work
elif "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    TARGET=cuda
else
    echo "gpu.sh: $PYTHON with torch sees no GPU here; --dry-run shows what would run" >&2
    exit 1
fi

# step SECONDS WHAT COMMAND...: runs it, but no longer than that, nor than what is left of all.
# A bench that is stopped prints and keeps what it has.
step() {
    local most=$1 what=$2 left=$((BUDGET - SECONDS)) status
    shift 2
    ((DRY || most > left)) && most=$left
    if ((most < 10)); then
        echo "== $what: skipped, no time left"
        return
    fi
    echo "== $what, at most $most s (at second $SECONDS)"
    timeout --kill-after=5 "$most" "$@"
    status=$?
    case $status in
    0) ;;
    124 | 137 | 143) echo "== $what: cut off; what it had measured is in $OUT" ;;
    *)
        echo "== $what: failed ($status)"
        FAILED=1
        ;;
    esac
}

correctness() {
    # Whole steps first: they say most in the first minute.
    local first=(tests/gpu/test_{step,kernels}.py) rest=() file
    for file in tests/gpu/test_*.py; do
        [[ " ${first[*]} " == *" $file "* ]] || rest+=("$file")
    done
    step 120 "gpu tests" "$PYTHON" -m pytest -q -p no:cacheprovider -p benchmarks.record \
        --record "$OUT" "${first[@]}" ${rest[@]+"${rest[@]}"}
}

tune() { # MODEL PRECISION
    local options=(--train --batch 128 --precision "$2" --target cuda --seconds 35)
    if ((DRY)); then
        [[ $1 == lenet5 ]] || return 0 # interpreted, others take minutes
        options=(--infer --batch 1 --precision "$2" --target interpret --seconds 0.1)
    fi
    step 55 "tune $1 $2" "$PYTHON" -m graphnet tune "$1" "${options[@]}" --out "$OUT"
}

tunes() {
    tune lenet5 fp32
    tune alexnet bf16
}

bench() { # SECONDS MODEL BATCH PRECISION OPTION...
    local most=$1 model=$2 batch=$3 precision=$4
    shift 4
    local options=(--target "$TARGET" --json "$OUT")
    if ((DRY)); then
        batch=1 precision=fp32
        [[ $model == lenet5 ]] && precision=bf16 # the small one has more variants
        options+=(--rounds 1 --seconds 0.1 --parity 1 --against eager,eager-graph)
    fi
    step "$most" "bench $model b$batch $precision" "$PYTHON" -m graphnet bench "$model" \
        --batch "$batch" --precision "$precision" "$@" "${options[@]}"
}

benches() {
    local all=eager,eager-graph,compile
    bench 110 alexnet 128 bf16 --against $all,compile-max --seconds 16 --parity 100
    bench 60 lenet5 128 fp32 --against $all --seconds 8 --ablate fusion,cudagraph,update-fusion
    if ((DRY)); then
        step 60 "LeNet-5 on digits" "$PYTHON" benchmarks/mnist99.py --target cpu --data digits \
            --epochs 1 --seeds 0 --json "$OUT"
    elif [[ -n ${GRAPHNET_DATA:-} ]]; then
        step 45 "LeNet-5 to 99 %" "$PYTHON" benchmarks/mnist99.py --target cuda --seeds 0-9 \
            --batch 192,256 --json "$OUT"
    else
        echo "== LeNet-5 to 99 %: skipped, GRAPHNET_DATA names no folder with MNIST"
    fi
    bench 45 alexnet_owt 128 bf16 --no-update --no-dropout --against eager,eager-graph --seconds 6
    bench 45 benchmarks/nets.py:kernelbench_alexnet 1024 tf32 --infer --against eager --seconds 6
}

[[ $PART == all || $PART == correctness ]] && correctness
[[ $PART == all || $PART == tune ]] && tunes
[[ $PART == all || $PART == bench ]] && benches
echo "== done at second $SECONDS; results in $OUT:"
ls -1 "$OUT"
exit $FAILED
