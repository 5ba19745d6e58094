#!/usr/bin/env bash
# Two machines that are network namespaces here, with a bad wire between them: `nodes.sh COMMAND…` runs a command on the first, where
# `mpirun --hostfile $NODES` reaches both. Root only. WIRE_DELAY is in seconds, WIRE_LOSS a share of frames.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
tag=r$$
wire=
clean() {
    [ -z "$wire" ] || kill "$wire" 2>/dev/null || true
    for name in a b w; do ip netns del "$tag$name" 2>/dev/null || true; done
    rm -rf "$work"
}
trap clean EXIT
for name in a b w; do
    ip netns add "$tag$name"
    ip -n "$tag$name" link set lo up
done
for node in a b; do
    ip -n "$tag$node" link add eth0 type veth peer name "to$node" netns "${tag}w"
    number=1; [ $node = a ] || number=2
    ip -n "$tag$node" addr add "10.77.0.$number/24" dev eth0
    ip -n "$tag$node" link set eth0 up
    ip -n "${tag}w" link set "to$node" up
    ip netns exec "$tag$node" python3 "$here/wire.py" --plain eth0
done
ip netns exec "${tag}w" python3 "$here/wire.py" toa tob "${WIRE_DELAY:-0.001}" "${WIRE_LOSS:-0.01}" >"$work/wire" &
wire=$!
until grep -q ready "$work/wire"; do sleep 0.05; done
# mpirun's way to the second machine.
cat >"$work/agent" <<AGENT
#!/bin/sh
shift
exec ip netns exec ${tag}b unshare --uts sh -c "hostname nodeb; \$*"
AGENT
chmod +x "$work/agent"
printf '10.77.0.1 slots=2\n10.77.0.2 slots=2\n' >"$work/nodes"
export NODES="$work/nodes" OMPI_MCA_plm_rsh_agent="$work/agent" OMPI_MCA_btl=tcp,self,vader
export OMPI_MCA_btl_tcp_if_include=10.77.0.0/24 OMPI_MCA_oob_tcp_if_include=10.77.0.0/24
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
status=0
ip netns exec "${tag}a" unshare --uts sh -c 'hostname nodea; exec "$@"' sh "$@" || status=$?
tail -n 1 "$work/wire" >&2
exit $status
