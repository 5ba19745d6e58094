"""Many clients at once: nothing is lost, nothing leaks. What was measured is printed, and no time is judged."""

import asyncio
import json
import random
import statistics
import time

import aiohttp

from conftest import NAME

WORDS = "the old man and a sea of night where she said that it was long ago in house by river with light on stone".split()


class Tally:
    """What became of the requests."""

    def __init__(self):
        self.answered = self.cancelled = self.tokens = 0
        self.lost, self.first, self.whole = [], [], []

    def report(self, seconds):
        def of(times):
            cuts = statistics.quantiles(times, n=100)
            return {"p50": round(cuts[49], 4), "p99": round(cuts[98], 4)}
        return {"seconds": round(seconds, 1), "answered": self.answered, "cancelled": self.cancelled, "lost": len(self.lost),
                "tokens_per_second": round(self.tokens / seconds, 1), "first_token_s": of(self.first), "whole_s": of(self.whole)}


async def one(session, chance, tally, cancels=True, tokens=None, stream=None):
    """One request of random shape, which may be given up at a random moment."""
    body = {"model": NAME, "prompt": " ".join(chance.choices(WORDS, k=chance.randint(1, 110))), "temperature": 1,
            "max_tokens": tokens or chance.choice([1, 8, 24, 60, 120]), "ignore_eos": True}
    streams = chance.random() < 0.5 if stream is None else stream
    if streams:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    gives_up = cancels and chance.random() < 0.15
    patience = chance.uniform(0, 1) if gives_up else None
    begun = time.monotonic()

    async def ask():
        async with session.post("/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            if not streams:
                return (await response.json())["usage"]["completion_tokens"]
            first, used, ended = None, None, False
            async for line in response.content:
                if line.startswith(b"data: {"):
                    first = first or time.monotonic()
                    chunk = json.loads(line[6:])
                    assert "error" not in chunk, chunk
                    used = (chunk.get("usage") or {}).get("completion_tokens", used)
                ended |= line.startswith(b"data: [DONE]")
            assert ended, "the stream broke off"
            tally.first.append(first - begun)
            return used

    try:
        tokens = await asyncio.wait_for(ask(), patience or 300)
    except asyncio.TimeoutError:
        if gives_up:
            tally.cancelled += 1
        else:
            tally.lost.append(f"no answer within 300 s: {body}")
        return
    except Exception as error:
        tally.lost.append(f"{type(error).__name__}: {error}")
        return
    assert tokens == body["max_tokens"], f"{tokens} tokens of {body['max_tokens']}"
    tally.answered += 1
    tally.tokens += tokens
    tally.whole.append(time.monotonic() - begun)


async def load(server, clients, seconds, **more):
    """So many clients, each with one request at a time; the memory of the server as it went on."""
    tally, memory = Tally(), []
    headers = {"authorization": f"Bearer {server.key}"} if server.key else {}
    end = time.monotonic() + seconds
    async with aiohttp.ClientSession(server.url, headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
        async def client(number):
            chance = random.Random(number)
            while time.monotonic() < end:
                await one(session, chance, tally, **more)

        async def watch():
            while time.monotonic() < end:
                memory.append((time.monotonic(), server.memory()))
                await asyncio.sleep(0.25)

        await asyncio.gather(watch(), *(client(i) for i in range(clients)))
    return tally, memory


def slope(points):
    """Bytes a second, by least squares."""
    xs, ys = zip(*points)
    x, y = statistics.fmean(xs), statistics.fmean(ys)
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a in xs)


def test_nothing_is_lost_and_nothing_leaks(servers, pytestconfig, record_property, capsys):
    seconds, clients = pytestconfig.getoption("--load-seconds"), pytestconfig.getoption("--clients")
    # A cache of the least size, which is full of what is kept for later before anything is measured.
    server = servers("--max-num-seqs", 48, "--kv-cache-memory", 0.01)
    kept = -1
    while kept < (kept := server.quiet()["vllm:kv_cache_pages_kept"]):
        asyncio.run(load(server, clients, 8))
    before = server.quiet()
    begun = time.monotonic()
    tally, memory = asyncio.run(load(server, clients, seconds))
    report = tally.report(time.monotonic() - begun)
    after = server.quiet()
    rest = memory[len(memory) // 4 :]
    report |= {"clients": clients, "memory_mb": round(memory[-1][1] / 1e6, 1), "memory_slope_kb_per_s": round(slope(rest) / 1e3, 1)}
    with capsys.disabled():
        print("\nload:", json.dumps(report))
    record_property("load", report)
    assert not tally.lost, tally.lost[:5]
    assert tally.answered > 2 * clients
    ended = after["vllm:request_success_total"] - before["vllm:request_success_total"]
    assert ended <= tally.answered + tally.cancelled and ended >= tally.answered, "the server counts other requests than were made"
    assert after["vllm:kv_cache_usage_perc"] == before["vllm:kv_cache_usage_perc"] == 0, "pages are held by nobody"
    grown = slope(rest) * (rest[-1][0] - rest[0][0])
    assert grown < max(16e6, 0.04 * memory[-1][1]), f"{grown / 1e6:.1f} MB more at the end than after a quarter"


def test_sixteen_clients_beside_one(servers, capsys, record_property):
    """Stated, not judged: the same requests by one client and by sixteen."""
    server = servers("--max-num-seqs", 16)
    asyncio.run(load(server, 4, 2, cancels=False))
    rates = {}
    for clients in (1, 16):
        begun = time.monotonic()
        tally, _ = asyncio.run(load(server, clients, 10, cancels=False, tokens=64, stream=True))
        assert not tally.lost, tally.lost[:5]
        rates[clients] = tally.tokens / (time.monotonic() - begun)
    ratio = rates[16] / rates[1]
    with capsys.disabled():
        print(f"\n1 client {rates[1]:.0f} tokens/s, 16 clients {rates[16]:.0f}: {ratio:.2f} times")
    record_property("ratio", ratio)
