#!/usr/bin/env bash
# The benchmarks of docs/speed.md again: bash benchmarks/speed.sh {cpu|cuda} MACHINE [FOLDER]
# Files end in the machine's name. An hour and a half on two CPU cores, ten minutes on an H200. What fails is named at the end.
set -u
[ $# -ge 2 ] || { sed -n 2,3p "$0"; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
device=$1 machine=$2 folder=${3:-$root/benchmarks/results} failed=()
pixeldip=$root/.venv/bin/pixeldip
[ -x "$pixeldip" ] || pixeldip=pixeldip
python=$root/.venv/bin/python
[ -x "$python" ] || python=python
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$root" || exit 1 # models are named from here

measure() { # FILE WHAT FLAGS…
    echo "== $*"
    "$pixeldip" bench "${@:2}" --device "$device" --out "$folder/$1_$machine.json" || failed+=("$1")
}

run() { # FILE SCRIPT FLAGS…
    echo "== $*"
    "$python" "$root/benchmarks/$2.py" "${@:3}" --out "$folder/$1_$machine.json" || failed+=("$1")
}

if [ "$device" = cpu ]; then
    measure latency latency --rounds 7 --compile --heads
    measure latency_xl latency --model dip-xl/16 --rounds 5 --compile --latent
    measure latency_heads_xl latency --model dip-xl/16 --rounds 3 --heads --latent # 20 GB, compiled it would be more
    measure latency_s latency --model dip-s/16 --rounds 7 --compile
    measure training training --batch 8 --rounds 5 --compile
    measure training_heads training --batch 2 --rounds 3 --heads # of 4 images the attention head takes 23 GB
    measure throughput throughput --model dip-s/16 --batches 1 2 4 8 --rounds 5
    measure throughput_b throughput --batches 1 2 4 8 --rounds 3 --compile
    run head_pair head_pair
    run profile_sampling profile_step sampling --model dip-b/16 --batch 1
    run profile_sampling_int8 profile_step sampling --model dip-b/16 --batch 1 --precision int8
    run profile_training profile_step training --model dip-b/16 --batch 8
    measure memory memory --batches 1 4 8
    measure memory_xl memory --model dip-xl/16 --batches 1 2 --heads
    measure scaling scaling --model dip-s/16 --height 128 --width 128 --batch 4 --processes 1 2 --rounds 7
    run decoding decoding
    run precisions_emoji64 precisions models/emoji64 --seeds 0-15
else
    measure training_xl training --model dip-xl/16 --batch 256 --rounds 5 --compile
    measure latency_xl_batch64 latency --model dip-xl/16 --batch 64 --rounds 3 --compile
    measure throughput_xl throughput --model dip-xl/16 --batches 1 16 128 --rounds 3 --compile
    measure latency_xl latency --model dip-xl/16 --rounds 5 --compile --latent
    measure training_heads_xl training --model dip-xl/16 --batch 64 --rounds 3 --heads
    measure memory_xl memory --model dip-xl/16 --batches 1 64
    run precisions_emoji64 precisions models/emoji64 --seeds 0-15
fi
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
