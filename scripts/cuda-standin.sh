#!/usr/bin/env bash
# Makes target/standin/libcuda.so.1, a CUDA driver over kernels compiled for the CPU, and beside it libcublas.so.13, what training
# multiplies with, and libnccl.so.2, by which ranks of a model exchange. With their folder on LD_LIBRARY_PATH, everything that takes --device cuda:0 runs without a GPU. Takes g++ (C++20).
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p target/standin
source=src/backend/cuda
out=target/standin
vector=
[ "$(uname -m)" = x86_64 ] && vector=-march=x86-64-v3
# library NAME SOURCE LEVEL FOLDER...: compiled, at a level of optimisation, when one of the sources in the folders is newer.
library() {
    local name=$1 main=$2 level=$3
    shift 3
    if [ -e "$out/$name" ] && [ -z "$(find "$@" -newer "$out/$name" -type f)" ]; then return; fi
    "${CXX:-g++}" -std=c++20 "$level" -Wall -Wno-unused-function -ffp-contract=off $vector -shared -fPIC -pthread \
        -o "$out/$name.part" "$main" -ldl
    mv "$out/$name.part" "$out/$name"
}
library libcuda.so.1 $source/standin/libcuda.cc -O3 $source/kernels $source/standin
library libcublas.so.13 $source/standin/libcublas.cc -O3 $source/standin/libcublas.cc
library libnccl.so.2 $source/standin/libnccl.cc -O2 $source/standin/libnccl.cc
