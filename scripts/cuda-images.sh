#!/usr/bin/env bash
# Makes src/backend/cuda/images/kernels.fatbin of the kernels' sources: machine code for every architecture, and PTX for what
# comes later. `--check` fails where what is committed is another. The compiler is PyPI's.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=target/nvcc
if [ ! -e $tools/done ]; then
    rm -rf $tools
    python3 -m venv $tools
    $tools/bin/pip install --quiet nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
        nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
    touch $tools/done
fi
nvcc=$(echo $tools/lib/python3*/site-packages/nvidia/cu13/bin/nvcc)
code="arch=compute_80,code=[sm_80,compute_80] arch=compute_89,code=sm_89 arch=compute_90,code=sm_90"
code="$code arch=compute_100f,code=sm_100f arch=compute_110f,code=sm_110f arch=compute_120f,code=sm_120f"
out=target/kernels.fatbin
# Products and sums are fused where the source says so, and nowhere else: as on the CPU.
"$nvcc" -std=c++17 -O3 -fmad=false --compress-mode=size -fatbin $(printf -- '-gencode %s ' $code) -o $out src/backend/cuda/kernels/all.cu
if [ "${1:-}" = --check ]; then
    cmp $out src/backend/cuda/images/kernels.fatbin
else
    mkdir -p src/backend/cuda/images
    mv $out src/backend/cuda/images/kernels.fatbin
fi
