#!/usr/bin/env bash
# One run on several machines, without a scheduler. The same command on each of them, but for its number:
#
#   scripts/torchrun_nodes.sh 0 node-a Pretrain.py --config configs/Pretrain.yaml --output_dir output/Pretrain
#   scripts/torchrun_nodes.sh 1 node-a Pretrain.py --config configs/Pretrain.yaml --output_dir output/Pretrain
#
# node-a: name or address of machine 0, where all of them meet. From the environment:
#   NUM_NODES   machines, 2 unless set
#   PROCESSES   on each machine, one for each GPU unless set
#   INTERFACE   network interface between the machines, as `ip address` lists it (eth0); found by the machine's name unless set
#   PORT        where they meet on machine 0, 29500 unless set
set -euo pipefail

if [ $# -lt 3 ]; then
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
number=$1 head=$2
shift 2
if [ -n "${INTERFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
cd "$(dirname "$0")/.."
exec python -m torch.distributed.run --nnodes="${NUM_NODES:-2}" --node_rank="$number" \
    --nproc_per_node="${PROCESSES:-gpu}" --master_addr="$head" --master_port="${PORT:-29500}" "$@"
