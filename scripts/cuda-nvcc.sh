#!/usr/bin/env bash
# Prints the path of the CUDA compiler: $NVCC, or PyPI's 13.0.88 in target/nvcc, which is installed at the first call. The
# disassemblers stand beside it. Fails where none can be had.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -n "${NVCC:-}" ]; then
    command -v "$NVCC"
    exit
fi
tools=target/nvcc
if [ ! -e $tools/with-disassemblers ]; then
    rm -rf $tools
    {
        python3 -m venv $tools
        $tools/bin/pip install --quiet nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
            nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37
    } >&2
    touch $tools/with-disassemblers
fi
echo $PWD/$tools/lib/python3*/site-packages/nvidia/cu13/bin/nvcc
