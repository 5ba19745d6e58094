"""`recoup serve` beside llama.cpp's server on the same machine, the same model, the same requests, in turn.

    python benches/peers/serve.py MODEL.gguf --llama-server PATH [--recoup PATH] [--clients 1,4,16] [--rounds 2]
        [--prompt 128] [--answer 64] [--each 4] [--threads N] [--checkpoint FOLDER] [--json FILE]

MODEL.gguf is imported by `recoup convert`, so that both have the same weights (F16 or F32 there, BF16 here; a quantized GGUF is
computed with quantized activations there and not here, which compares nothing), or FOLDER is served here instead: the same model
quantized by each in its own way, such as NVFP4 here beside Q4_0 there. Every request is a prompt of its own, so that no
prefix cache counts; answers go on to their length whatever the model says. The servers take turns, round by round, and only
one of them is running at a time. Needs nothing but Python.
"""

import argparse
import http.client
import json
import os
import random
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

WORDS = "the old man and a sea of night where she said that it was long ago in house by river with light on stone".split()


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server while it is in use."""

    def __init__(self, command, port):
        self.port, self.log = port, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(list(map(str, command)), stdout=self.log, stderr=self.log)

    def __enter__(self):
        end = time.monotonic() + 300
        while time.monotonic() < end and self.process.poll() is None:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return self
            except OSError:
                pass
            time.sleep(0.1)
        self.log.seek(0)
        raise SystemExit(f"the server did not come up:\n{self.log.read()[-2000:]}")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(60)


def ask(port, prompt, answer):
    """Seconds to the first token, seconds from there to the last, tokens."""
    body = {"model": "model", "prompt": prompt, "max_tokens": answer, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    begun = time.monotonic()
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{response.status}: {response.read()[:500]}")
    first = last = tokens = None
    for line in response:
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            if chunk.get("choices") and chunk["choices"][0].get("text"):
                last = time.monotonic()
                first = first or last
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    connection.close()
    if tokens != answer:
        raise SystemExit(f"an answer has {tokens} tokens, {answer} were asked for")
    return first - begun, last - first, tokens


def measure(port, clients, each, prompt, answer, seed):
    """So many clients with one request at a time."""
    results, lock = [], threading.Lock()

    def client(number):
        chance = random.Random(f"{seed} {number}")
        for _ in range(each):
            # About a token a word.
            found = ask(port, " ".join(chance.choices(WORDS, k=prompt)), answer)
            with lock:
                results.append(found)

    begun = time.monotonic()
    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - begun
    if len(results) != clients * each:
        raise SystemExit("not every request was answered")
    return {
        "tokens_per_second": sum(n for _, _, n in results) / seconds,
        "first_token_ms": 1000 * statistics.median(first for first, _, _ in results),
        "token_ms": 1000 * statistics.median(rest / (n - 1) for _, rest, n in results),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-server", required=True)
    parser.add_argument("--recoup", default="target/release/recoup")
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--each", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--checkpoint", type=Path, help="what is served here instead of MODEL.gguf")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    clients = [int(n) for n in args.clients.split(",")]
    most, context = max(clients), args.prompt * 2 + args.answer

    folder = args.checkpoint or Path(tempfile.mkdtemp()) / "model"
    if not args.checkpoint:
        subprocess.run([args.recoup, "convert", args.model, "-o", folder], check=True, stdout=subprocess.DEVNULL)

    def recoup(port):
        return [args.recoup, "serve", folder, "--port", port, "--served-model-name", "model", "--max-num-seqs", most, "--no-page",
                "--max-model-len", context, "--threads", args.threads]

    def llama(port):
        return [args.llama_server, "-m", args.model, "--port", port, "-c", context * most, "-np", most, "-t", args.threads, "-tb", args.threads]

    load = os.getloadavg()[0]
    found = {(name, n): [] for name in ("recoup", "llama.cpp") for n in clients}
    for turn in range(args.rounds):
        for name, command in (("recoup", recoup), ("llama.cpp", llama)):
            port = free_port()
            with Server(command(port), port):
                measure(port, 1, 1, args.prompt, 8, "warm")
                for n in clients:
                    found[name, n].append(measure(port, n, args.each, args.prompt, args.answer, f"{turn} {n}"))

    print(f"load of the machine before: {load:.1f} (what else ran makes this worthless: threads that wait spin)")
    print(f"{args.model.name}: prompts of {args.prompt} words, answers of {args.answer} tokens, {args.each} for each client, {args.rounds} rounds, {args.threads} threads")
    print("| clients | | recoup | llama.cpp | ratio |\n|---|---|---|---|---|")
    rows = []
    for n in clients:
        for key, title, more in (("tokens_per_second", "tokens/s", True), ("first_token_ms", "first token, ms", False), ("token_ms", "each token, ms", False)):
            ours, theirs = ([r[key] for r in found[name, n]] for name in ("recoup", "llama.cpp"))
            ratio = statistics.fmean(ours) / statistics.fmean(theirs)
            span = lambda values: f"{min(values):.0f} to {max(values):.0f}" if len(values) > 1 else f"{values[0]:.0f}"
            print(f"| {n} | {title} | {span(ours)} | {span(theirs)} | {ratio:.2f} {'(more is better)' if more else '(less is better)'} |")
            rows.append({"clients": n, "measure": key, "recoup": ours, "llama.cpp": theirs, "ratio": ratio})
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
