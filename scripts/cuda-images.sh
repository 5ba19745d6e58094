#!/usr/bin/env bash
# Makes src/backend/cuda/images/kernels.fatbin of the kernels' sources: machine code for every architecture, and PTX for what
# comes later; and beside it kernels.txt, what the assembler made of each kernel, and kernels.sha256, of what and by what they were made.
# `--check` fails where what is committed is another; it compiles only where something of that is not as kernels.sha256 has it. Spills in
# a loop, and products without a tensor instruction, fail whenever it compiles. The compiler is PyPI's.
set -euo pipefail
cd "$(dirname "$0")/.."
images=src/backend/cuda/images
# Every source, what compiles them, and what came of it.
sums() { find src/backend/cuda/kernels scripts/cuda-images.sh scripts/cuda-nvcc.sh $images/kernels.fatbin $images/kernels.txt -type f | LC_ALL=C sort | xargs sha256sum; }
if [ "${1:-}" = --check ] && sums | cmp -s - $images/kernels.sha256; then
    echo "sources, compiler and images are those of $images/kernels.sha256"
    exit
fi
nvcc=$(scripts/cuda-nvcc.sh)
code="arch=compute_80,code=[sm_80,compute_80] arch=compute_89,code=sm_89 arch=compute_90,code=sm_90"
code="$code arch=compute_100f,code=sm_100f arch=compute_110f,code=sm_110f arch=compute_120f,code=sm_120f"
mkdir -p target $images
out=target/kernels
# Products and sums are fused where the source says so, and nowhere else: as on the CPU.
"$nvcc" -std=c++17 -O3 -fmad=false --threads 0 --compress-mode=size -fatbin $(printf -- '-gencode %s ' $code) -o $out.fatbin src/backend/cuda/kernels/all.cu
python3 - "$(dirname "$nvcc")/cuobjdump" $out.fatbin > $out.txt <<'EOF'
import re, subprocess, sys

# Products that may do without a tensor instruction, and why. What may spill in a loop, how many bytes at most, and why.
NO_TENSOR = {"matmul_f32": "weights in f32, which no packed format holds exactly; a few outputs"}
SPILLS = [("matmul_", 24, "constants of the loop, which the assembler gives up for one more block on a multiprocessor")]


def dump(*flags):
    return subprocess.run([sys.argv[1], *flags, sys.argv[2]], stdout=subprocess.PIPE, text=True, check=True).stdout


print("# What the assembler made of each kernel. loop: the one with most tensor instructions, without any the longest;")
print("# per tensor: its issue slots (instructions) to a tensor instruction. stack: bytes a thread has in local memory.")
print(f"{'arch':6s} {'kernel':26s} registers stack shared tensor   loop per tensor")
failed = False
# Of sm_100, whose other kernels are as those of sm_90, only what it alone has.
for arch in ("sm_80", "sm_90", "sm_100", "sm_120"):
    usage = {}
    for name, use in re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", dump("-res-usage", "-arch", arch)):
        usage[name] = dict(re.findall(r"(\w+):(\d+)", use))
    for part in dump("-sass", "-arch", arch).split("Function : ")[1:]:
        name = part.split()[0]
        if arch == "sm_100" and "tcgen" not in name and name != "sum_slices":
            continue
        code = [(int(at, 16), re.sub(r"^@!?U?P\w+\s+", "", text)) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+?)\s*;", part)]
        ops = [text.split()[0].split(".")[0] for _, text in code]
        loops = []
        for i, (at, text) in enumerate(code):
            jump = re.match(r"BRA\S*\s.*?(0x[0-9a-f]+)$", text)
            # The last jump of a kernel is to itself.
            if jump and (to := int(jump[1], 16)) < at:
                loops.append(ops[next(n for n, (a, _) in enumerate(code) if a == to):i + 1])
        tensor = lambda ops: sum("MMA" in op for op in ops)
        best = max(loops, key=lambda l: (tensor(l), -len(l) if tensor(l) else len(l)), default=[])
        n, use = tensor(best), usage[name]
        print(f"{arch:6s} {name:26s} {use['REG']:>9s} {use['STACK']:>5s} {use['SHARED']:>6s} {tensor(ops):6d} {len(best):6d}" + (f" {len(best) / n:10.1f}" if n else ""))
        allowed = max((most for start, most, _ in SPILLS if name.startswith(start)), default=0)
        if any(op in ("LDL", "STL") for l in loops for op in l) and int(use["STACK"]) > allowed:
            print(f"{arch} {name}: a loop spills registers", file=sys.stderr)
            failed = True
        if name.startswith("matmul") and not tensor(ops) and name not in NO_TENSOR:
            print(f"{arch} {name}: no tensor instruction", file=sys.stderr)
            failed = True
        narrow = re.match(r"(matmul|tile|mixture)_fp([48])", name)
        if narrow and ops.count({"4": "OMMA", "8": "QMMA"}[narrow[2]]) != tensor(ops):
            print(f"{arch} {name}: products that are not those of FP4 or FP8 tensor cores", file=sys.stderr)
            failed = True
        # Two products of a step, of four scales a row or two.
        product = "UTCOMMA.4X" if "_16" in name else "UTCOMMA"
        if re.match(r"(matmul|tile|mixture)_tcgen", name) and [text.split()[0] for _, text in code if "MMA" in text.split()[0]] != [product] * 2:
            print(f"{arch} {name}: not two products by tcgen05", file=sys.stderr)
            failed = True
sys.exit(failed)
EOF
for kind in fatbin txt; do
    committed=$images/kernels.$kind
    if [ "${1:-}" != --check ]; then
        mv $out.$kind $committed
    elif [ $kind = txt ]; then
        diff $committed $out.$kind
    else
        cmp $committed $out.$kind
    fi
done
if [ "${1:-}" != --check ]; then
    sums > $images/kernels.sha256
else
    sums | diff $images/kernels.sha256 - || { echo "$images/kernels.sha256 is of others: run scripts/cuda-images.sh" >&2; exit 1; }
fi
