#!/usr/bin/env bash
# Runs every kernel, compiled for the CPU, against its definition, with every access checked (src/backend/cuda/standin).
# usage: cuda-check.sh [--only FILE] [DIR]   FILE: matmul, operand, attention, rows, mixture or sample (.cu); DIR: the kernels' folder
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
vector=
[ "$(uname -m)" = x86_64 ] && vector=-march=x86-64-v3
"${CXX:-g++}" -std=c++20 -O1 -Wall -Wno-unused-function -ffp-contract=off $vector -pthread \
    -DKERNELS='"../kernels/all.cu"' -o "$work/check" "$work/standin/check.cc"
timeout 300 "$work/check" "${only[@]}"
