#!/usr/bin/env bash
# Runs every kernel, compiled for the CPU, against its definition, with every access checked (src/backend/cuda/standin).
# usage: cuda-check.sh [--only FILE] [DIR]   FILE: matmul, tile, narrow, tcgen, operand, attention, recurrent, rows, mixture or sample (.cu), or
# primitives; DIR: the kernels' folder
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
only=()
while [ $# -gt 0 ]; do
    case $1 in
        --only) only=("$(basename "$2" .cu)"); shift 2 ;;
        *) break ;;
    esac
done
kernels=$(cd "${1:-$root/src/backend/cuda/kernels}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Headers of the stand-in stand beside the kernels, wherever those are.
cp -r "$kernels" "$work/kernels"
cp -r "$root/src/backend/cuda/standin" "$work/standin"
# Then the same with the kernels run from the PTX that nvcc makes of them, where there is one or it can be installed.
architectures="80 90 120f 100f"
[ ${#only[@]} -gt 0 ] && architectures=80
# What only the families of sm_120 and sm_100 have.
case ${only[0]:-} in narrow) architectures=120f ;; tcgen) architectures=100f ;; primitives) architectures="120f 100f" ;; esac
if nvcc=$("$root/scripts/cuda-nvcc.sh" 2> "$work/no-nvcc"); then
    {
        for a in $architectures; do
            "$nvcc" -std=c++17 -O3 -fmad=false -ptx -arch=compute_$a -o "$work/$a.ptx" "$work/standin/checked.cu"
        done
    } > "$work/nvcc.log" 2>&1 &
    compiler=$!
else
    nvcc=
fi
vector=
[ "$(uname -m)" = x86_64 ] && vector=-march=x86-64-v3
"${CXX:-g++}" -std=c++20 -O1 -Wall -Wno-unused-function -ffp-contract=off $vector -pthread \
    ${nvcc:+-DPTX} -o "$work/check" "$work/standin/check.cc"
status=0
echo "compiled for the CPU"
timeout 300 "$work/check" "${only[@]}" || status=1
if [ -z "$nvcc" ]; then
    tail -n 1 "$work/no-nvcc"
    echo "NOT CHECKED: the compiler's PTX, because there is no nvcc (set NVCC, or let pip reach PyPI)"
    exit $status
fi
wait $compiler || { cat "$work/nvcc.log"; exit 1; }
different=()
for a in $architectures; do
    sed '/^\.target/d' "$work/$a.ptx" > "$work/plain"
    if [ -e "$work/seen" ] && cmp -s "$work/plain" "$work/seen"; then
        echo "PTX for compute_$a: as the one before"
        continue
    fi
    mv "$work/plain" "$work/seen"
    different+=("$a")
done
# Two at a time: each takes one core.
running=()
for a in "${different[@]}"; do
    timeout 300 "$work/check" --ptx "$work/$a.ptx" "${only[@]}" > "$work/$a.log" 2>&1 &
    running+=($!)
    [ ${#running[@]} -lt 2 ] || wait "${running[-2]}" || status=1
done
[ ${#running[@]} -eq 0 ] || wait "${running[-1]}" || status=1
for a in "${different[@]}"; do
    echo "PTX for compute_$a"
    cat "$work/$a.log"
done
exit $status
