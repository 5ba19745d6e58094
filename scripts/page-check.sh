#!/usr/bin/env bash
# The page at `/` in a headless Chromium: streaming, hostile model output, errors, keys, compare, reports, phone, accessibility.
# usage: page-check.sh [test options of node]     (RECOUP_URL: a real server as well; PAGE_SHOTS: a folder for screenshots)
set -euo pipefail
cd "$(dirname "$0")/.."
command -v node >/dev/null || { echo "page-check needs node 20 or later" >&2; exit 1; }
if [ -z "${CHROMIUM:-}" ] && ! command -v chromium chromium-browser google-chrome >/dev/null; then
    echo "page-check: installing Debian's chromium"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
fi
mkdir -p target/page
if ! cmp -s tests/page/package-lock.json target/page/package-lock.json || [ ! -d target/page/node_modules ]; then
    cp tests/page/package.json tests/page/package-lock.json target/page/
    npm ci --prefix target/page --silent --no-audit --no-fund
fi
exec node --test --test-force-exit --test-reporter=spec "$@" tests/page/page_test.mjs
