#!/usr/bin/env bash
# What takes features that need more than crates: one training and one model by several processes of MPI, on this machine and on two
# that are network namespaces with a bad wire between them, and results in an object store. `--tools` only installs what that takes.
set -euo pipefail
cd "$(dirname "$0")/.."
missing=()
command -v mpicc >/dev/null && command -v mpirun >/dev/null || missing+=(openmpi-bin libopenmpi-dev)
[ -n "$(find /usr/lib -name 'libclang*.so*' ! -name 'libclang-cpp*' -print -quit 2>/dev/null)" ] || missing+=(libclang-dev)
command -v ip >/dev/null || missing+=(iproute2)
if [ ${#missing[@]} -gt 0 ]; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
[ "${1:-}" != --tools ] || exit 0
# Another build of everything here, for features alone: less optimised, which computes the same.
CARGO_PROFILE_DEV_OPT_LEVEL=1 cargo test --features cluster,object-store --test cluster
