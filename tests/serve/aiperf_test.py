"""NVIDIA's aiperf against `recoup serve`: every request is answered, and it finds what it measures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import NAME
from lm_eval_test import tokenizer  # noqa: F401 (a fixture)

REQUESTS = 24


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_benchmark_runs_without_errors(server, tokenizer, tmp_path, endpoint):  # noqa: F811
    command = [
        Path(sys.executable).with_name("aiperf"), "profile", "--model", NAME, "--url", server.url, "--api-key", server.key,
        "--endpoint-type", endpoint, "--streaming", "--tokenizer", tokenizer[1], "--concurrency", 4, "--request-count", REQUESTS,
        "--synthetic-input-tokens-mean", 40, "--synthetic-input-tokens-stddev", 5, "--output-tokens-mean", 24,
        "--extra-inputs", "ignore_eos:true", "--artifact-dir", tmp_path, "--ui", "simple", "--random-seed", 1, "--no-gpu-telemetry",
    ]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=400)
    said = ran.stdout + ran.stderr
    assert ran.returncode == 0, said[-3000:]
    found = json.loads(next(tmp_path.rglob("profile_export_aiperf.json")).read_text())
    assert found["request_count"]["avg"] == REQUESTS, found.get("error_summary")
    assert not found.get("error_summary"), found["error_summary"]
    assert found["output_token_throughput"]["avg"] > 0 and found["time_to_first_token"]["avg"] > 0
