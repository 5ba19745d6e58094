#!/usr/bin/env bash
# Makes the models of this folder anew: models/make.sh CORPUS OUT
#
# CORPUS holds train.txt and valid.txt: the books of corpus.json, in its order, each as plain text with typographic quotes
# and dashes folded to ASCII, with lines of `<|endoftext|>` between them. The same machine gives the same bytes.
set -euo pipefail
corpus=$1 out=$2
here=$(cd "$(dirname "$0")" && pwd)
recoup=${RECOUP:-recoup}
mkdir -p "$out"
run() { echo "+ recoup $*" >&2; "$recoup" "$@"; }

run pretrain "$here/books-bf16" -o "$out/books-bf16" --data "$corpus/train.txt" --watch "$corpus/valid.txt" \
    --settings steps=6000,lr=3e-3,sequences=16,warmup=200 --resume
run quantize "$out/books-bf16" -o "$out/books-nvfp4" --recipe nvfp4
run quantize "$out/books-bf16" -o "$out/books-nvfp4-best" --recipe nvfp4_best --keep-unrounded "$out/unrounded"
recover() {
    run recover "$out/books-nvfp4-best" --teacher "$out/books-bf16" --unrounded "$out/unrounded" \
        --data "$corpus/train.txt" --watch "$corpus/valid.txt" --samples 8000 --watch-samples 64 --evaluate-every 100 "$@"
}
recover -o "$out/books-nvfp4-qat" --method qat:steps=800,lr=6e-4,sequences=8,average=0.98
recover -o "$out/books-nvfp4-qad" --method qad:steps=800,lr=6e-4,sequences=8,average=0.98
