#!/usr/bin/env bash
# `recoup serve` from outside: OpenAI's client, lm-evaluation-harness, aiperf, a load of 64 clients, faults; the page in Chromium.
# usage: serve-check.sh [--load-seconds N] [options of pytest]      (300 before a release; 60 by default)
#
# RECOUP    the binary [built here when not given]
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${RECOUP:-}" ]; then
    cargo build --quiet
    RECOUP=$PWD/target/debug/recoup
fi
export RECOUP

venv=target/serve-check/venv
if ! cmp -s tests/serve/requirements.txt "$venv/requirements.txt"; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r tests/serve/requirements.txt
    cp tests/serve/requirements.txt "$venv/"
fi
"$venv/bin/python" -m pytest --quiet -p no:cacheprovider -p no:warnings --timeout 600 tests/serve "$@"
