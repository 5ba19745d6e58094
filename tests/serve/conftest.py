"""`recoup serve` for the tests: as many servers as they ask for, each on a free port, ended after them."""

import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
RECOUP = os.environ.get("RECOUP", str(ROOT / "target/debug/recoup"))
MODEL = ROOT / "models/books-nvfp4"
NAME = MODEL.name
TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def pytest_addoption(parser):
    parser.addoption("--load-seconds", type=float, default=60, help="how long the load goes on [60; 300 before a release]")
    parser.addoption("--clients", type=int, default=64, help="clients of the load [64]")


class Server:
    """One `recoup serve`, started with these options."""

    def __init__(self, *options, models=(MODEL,), key=None, port=0):
        command = [RECOUP, "serve", *map(str, models), "--port", str(port), *map(str, options)]
        self.key = key
        if key:
            command += ["--api-key", key]
        self.log = tempfile.NamedTemporaryFile("w+", prefix="recoup-serve-", suffix=".log", delete=False)
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        self.url = self._address()
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=120)

    def _address(self):
        end = time.monotonic() + 180
        while time.monotonic() < end:
            found = re.search(r"listening on (http://\S+)", self.said())
            if found:
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.process.kill()
        raise RuntimeError(f"recoup serve did not come up:\n{self.said()}")

    def said(self):
        """What it has written so far."""
        return Path(self.log.name).read_text(errors="replace")

    def ask(self, path="/v1/completions", **body):
        """The response to one request; the model is added where none is named."""
        return self.http.post(path, json={"model": NAME, **body})

    def metrics(self):
        """Each series of /metrics, summed over its labels."""
        sums = {}
        for line in self.http.get("/metrics").text.splitlines():
            found = re.match(r"([a-zA-Z_:][\w:]*)(?:\{[^}]*\})? (\S+)$", line)
            if found:
                sums[found[1]] = sums.get(found[1], 0.0) + float(found[2])
        return sums

    def quiet(self, seconds=20):
        """Waits until nothing runs or waits, and gives the metrics then."""
        end = time.monotonic() + seconds
        while True:
            metrics = self.metrics()
            left = {k: metrics[k] for k in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")}
            if not any(left.values()):
                return metrics
            assert time.monotonic() < end, f"after {seconds} s there is still {left}"
            time.sleep(0.05)

    def memory(self):
        """Bytes of memory that it holds."""
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(found[1]) * 1024

    def stop(self, seconds=90):
        """Ends it as a supervisor does, and gives its exit code."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@pytest.fixture(scope="session")
def servers():
    """Makes servers; all are ended with the session, and each must have ended well."""
    started = []

    def start(*options, **more):
        started.append(Server(*options, **more))
        return started[-1]

    yield start
    for server in started:
        gone = server.process.poll()
        code = server.stop()
        assert code == 0, f"recoup serve ended with {code} ({'before' if gone is not None else 'when'} it was told to):\n{server.said()[-3000:]}"


@pytest.fixture(scope="session")
def server(servers):
    """The server that most tests ask: a chat template, and both parsers."""
    return servers("--chat-template", TEMPLATE, "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3", key="a-key-for-tests")
