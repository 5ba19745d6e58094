"""Recoup's engine beside llama.cpp's on this machine, in turn: a prompt's tokens per second, and a token's.

    python benches/peers/llama_cpp.py CHECKPOINT MODEL.gguf --llama-bench PATH [--recoup PATH] [--rounds 5]
        [--prompt 256] [--generate 64] [--threads N] [--batch 1,8] [--isa avx2] [--json FILE]

CHECKPOINT and MODEL.gguf are the same model, each in the format to be compared (NVFP4 and Q4_0, BF16 and BF16). `llama-bench` is
llama.cpp's own (`cmake --build BUILD --target llama-bench`; its source is in the package llama-cpp-python). Both decode from an
empty cache, as `llama-bench` does; a step of Recoup is the median of one run's. Figures are the best and the median over the
rounds: other users of a machine only make things slower, so the best of many is what the machine can do, and where it is far from
the median the machine was busy. Needs nothing but Python.
"""

import argparse
import json
import os
import statistics
import subprocess


def recoup(args, batch):
    """Tokens per second of a prompt, and of decoding `batch` sequences."""

    def cases(prompt, generate, batches):
        command = [args.recoup, "bench", args.checkpoint, "--json", "--prompt", str(prompt), "-n", str(generate)]
        command += ["--batch", ",".join(map(str, batches)), "--threads", str(args.threads)]
        command += ["--isa", args.isa] if args.isa else []
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(done.stdout)["cases"]

    rates = {f"prompt of {args.prompt}": cases(args.prompt, 8, [1])[0]["prefill_tokens_per_second"]}
    for case in cases(1, args.generate, batch):
        name = "decode" if case["batch"] == 1 else f"decode {case['batch']} sequences"
        rates[name] = case["tokens_per_second"]
    return rates


def llama(args):
    """The same of `llama-bench`, which decodes one sequence."""
    command = [args.llama_bench, "-m", args.gguf, "-t", str(args.threads), "-p", str(args.prompt), "-n", str(args.generate)]
    done = subprocess.run([*command, "-r", "3", "-o", "json"], check=True, capture_output=True, text=True)
    rates = {}
    for row in json.loads(done.stdout):
        name = "decode" if row["n_gen"] else f"prompt of {args.prompt}"
        rates[name] = row["avg_ts"]
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("gguf")
    parser.add_argument("--llama-bench", required=True)
    parser.add_argument("--recoup", default="target/release/recoup")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--isa", help="instruction set that Recoup uses, where llama.cpp was built for less than the machine has")
    parser.add_argument("--json")
    args = parser.parse_args()
    batch = [int(b) for b in args.batch.split(",")]

    rounds = []
    for number in range(args.rounds):
        # Who comes first changes from round to round.
        order = [("recoup", lambda: recoup(args, batch)), ("llama.cpp", lambda: llama(args))]
        rounds.append({name: measure() for name, measure in (order if number % 2 == 0 else order[::-1])})

    print(f"tokens per second, best (median) of {args.rounds} rounds in turn, {args.threads} threads")
    print(f"{'':22}{'recoup':>18}{'llama.cpp':>18}{'ratio of the best':>20}{'of pairs, median':>18}")
    for name in rounds[0]["recoup"]:
        ours = [r["recoup"][name] for r in rounds]
        theirs = [r["llama.cpp"][name] for r in rounds if name in r["llama.cpp"]]
        show = lambda x: f"{max(x):.0f} ({statistics.median(x):.0f})" if x else "-"  # noqa: E731
        ratios = [a / b for a, b in zip(ours, theirs)]
        best = f"{max(ours) / max(theirs):.2f}" if theirs else "-"
        paired = f"{statistics.median(ratios):.2f}" if ratios else "-"
        print(f"{name:22}{show(ours):>18}{show(theirs):>18}{best:>20}{paired:>18}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"prompt": args.prompt, "generate": args.generate, "threads": args.threads, "rounds": rounds}, file, indent=1)


main()
