#!/usr/bin/env bash
# All that a GPU can say of this build, in at most ten minutes, for the day on which one is at hand: does it load, is it right,
# how fast is it. One table at the end, everything else in files that can be sent in.
# usage: gpu-check.sh [OUT]     (default: gpu-check in the current folder)
#
# RECOUP            the binary [built here when not given]
# RECOUP_GPU_SMALL  when set: sizes for a stand-in, to try this script (target/standin on LD_LIBRARY_PATH)
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=$(mkdir -p "${1:-gpu-check}" && cd "${1:-gpu-check}" && pwd)
cd "$root"
small=${RECOUP_GPU_SMALL:-}
started=$(date +%s)
deadline=$((started + ${RECOUP_GPU_SECONDS:-570}))
rows=()
failed=0

if [ -z "${RECOUP:-}" ]; then
    cargo build --release --quiet || exit 1
    RECOUP=target/release/recoup
fi

# step NAME SECONDS COMMAND...: runs it with what time is left, keeps what it says, notes how it ended.
step() {
    local name=$1 limit=$2 left=$((deadline - $(date +%s)))
    shift 2
    if [ "$left" -lt 5 ]; then rows+=("$name|not run|no time left"); failed=1; return 1; fi
    [ "$limit" -lt "$left" ] || limit=$left
    local begun=$(date +%s%N)
    timeout "$limit" "$@" >"$out/$name.txt" 2>"$out/$name.err"
    local code=$? took=$((($(date +%s%N) - begun) / 1000000))
    if [ $code -eq 0 ]; then rows+=("$name|ok|$took ms"); return 0; fi
    if [ $code -eq 124 ]; then rows+=("$name|TOO SLOW|$limit s were not enough"); else
        rows+=("$name|FAILED ($code)|$(cat "$out/$name.err" "$out/$name.txt" | grep -m1 '^error\|^WRONG\|differ' | cut -c1-160)")
    fi
    failed=1
    return 1
}

# 1. What there is, and which images load: machine code, then the driver's own from PTX.
step device 30 "$RECOUP" doctor
command -v nvidia-smi >/dev/null && nvidia-smi -q >"$out/nvidia-smi.txt" 2>&1
ids="$out/ids.json"
echo '[[3,141,59,26,53,58,97,93,23,84,62,64,33,83,27,95]]' >"$ids"
# What the driver assembles has no products for FP4 and FP8 tensor cores; the same bits come without them.
step load 60 env RECOUP_CUDA_NARROW=0 "$RECOUP" logits models/books-nvfp4 --input-ids "$ids" -o "$out/gpu.safetensors" --device cuda:0
step load-ptx 90 env CUDA_FORCE_PTX_JIT=1 "$RECOUP" logits models/books-nvfp4 --input-ids "$ids" -o "$out/ptx.safetensors" --device cuda:0
[ -f "$out/gpu.safetensors" ] && [ -f "$out/ptx.safetensors" ] &&
    step same-bits-from-ptx 10 cmp "$out/gpu.safetensors" "$out/ptx.safetensors"

# 2. Every kernel against the CPU, and what products and memory give.
step kernels 180 "$RECOUP" doctor --device cuda:0
if [ -n "$small" ]; then width=256; else width=8192; fi
step speed 120 "$RECOUP" doctor --device cuda:0 --measure $width
# Where FP4 or FP8 tensor cores compute: the same without them.
grep -Eq "on FP4(, FP8)? and BF16 tensor cores" "$out/speed.err" &&
    step speed-without-narrow 120 env RECOUP_CUDA_NARROW=0 "$RECOUP" doctor --device cuda:0 --measure $width

# 3. Accesses and races, by NVIDIA's own tool, on a short run.
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step "$tool" 90 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$RECOUP" logits models/books-nvfp4 --input-ids "$ids" -o "$out/$tool.safetensors" --device cuda:0
    done
else
    rows+=("memcheck, racecheck|not run|compute-sanitizer is not installed")
fi

# 4. Whole models: greedy text as on the CPU, then time to the first token and of each.
if [ -n "$small" ]; then length=12; else length=200; fi
for device in cpu cuda:0; do
    step "text-${device%%:*}" 60 "$RECOUP" run models/books-nvfp4 --raw -p "It was a dark" -n $length --temperature 0 --device $device
done
step same-text 5 cmp "$out/text-cpu.txt" "$out/text-cuda.txt"
shapes=(llama-3.1-8b:nvfp4 llama-3.1-8b:fp8_pc_pt smollm2-135m:nvfp4 qwen3-30b-a3b:nvfp4)
batches=1,3,8,32
prompts=128,2048
[ -n "$small" ] && shapes=(tiny:nvfp4 tiny:fp8_pc_pt) batches=1,3 prompts=16
for shape in "${shapes[@]}"; do
    step "bench-${shape/:/-}" 100 "$RECOUP" bench --model-shape "${shape%%:*}" --recipe "${shape##*:}" --device cuda:0 \
        --batch $batches --prompt $prompts -n 32 --kv-cache-dtype bf16
done

# 5. Training: the same few steps of QAD by either device, twice as many the second time, for what one of them takes.
if [ -n "$small" ]; then steps="4 8" length=32; else steps="10 30" length=256; fi
train() { # DEVICE STEPS
    step "train-${1%%:*}-$2" 100 "$RECOUP" recover models/books-nvfp4 --teacher models/books-bf16 --data src/corpus/calibration.txt \
        --samples 48 --length $length --watch-samples 4 --method "qad:steps=$2,sequences=4,lr=3e-5" --evaluate-every "$2" \
        --device "$1" -o "$out/train-${1%%:*}-$2"
}
for device in cpu cuda:0; do
    for n in $steps; do train $device "$n" || break; done
done
if grep -qs "pip install nvidia-cublas" "$out"/train-cuda-*.err; then rows+=("training|needs cuBLAS|pip install nvidia-cublas"); fi
# KL of the watched texts at the beginning and the end, and seconds from one step to the next.
trained() {
    local few=${steps% *} many=${steps#* } device
    for device in cpu cuda; do
        [ -f "$out/train-$device-$many/recoup_curve.jsonl" ] || continue
        local seconds=()
        for n in $few $many; do seconds+=("$(sed -n 's/^wrote .* in \([0-9.]*\) s.*/\1/p' "$out/train-$device-$n.err")"); done
        grep '"watched"' "$out/train-$device-$many/recoup_curve.jsonl" |
            sed 's/.*"step":\([0-9]*\).*"loss":{\(.*\)},.*/step \1: \2/' | sed "s/^/QAD on $device, KL at /"
        awk -v d="$device" -v a="${seconds[0]}" -v b="${seconds[1]}" -v n="$few" -v m="$many" -v t=$((4 * length)) \
            'BEGIN { printf "QAD on %s: %.3f s a step of %d tokens\n", d, (b - a) / (m - n), t }'
    done
}

# 6. The tests of the library and the verbs, where there is a toolchain and time.
if [ -z "$small" ] && command -v cargo >/dev/null && [ $((deadline - $(date +%s))) -gt 60 ]; then
    step tests 300 cargo test --quiet --test cuda
fi

{
    echo "recoup $("$RECOUP" --version | cut -d' ' -f2), $(date -u +%FT%TZ), $(($(date +%s) - started)) s"
    grep -h GPU "$out/device.txt" 2>/dev/null
    for row in "${rows[@]}"; do IFS='|' read -r name state note <<<"$row"; printf '%-28s %-14s %s\n' "$name" "$state" "$note"; done
    tail -n1 "$out/kernels.txt" 2>/dev/null
    for f in "$out"/speed*.txt; do sed -n '/^a copy moves/,$p' "$f" 2>/dev/null; done
    for f in "$out"/bench-*.txt; do [ -f "$f" ] && cat "$f"; done
    grep -h "^products by" "$out"/train-cuda-*.err 2>/dev/null | sort -u
    trained
} | tee "$out/table.txt"
tar -C "$(dirname "$out")" -czf "$out.tar.gz" "$(basename "$out")"
echo "everything: $out.tar.gz"
exit $failed
