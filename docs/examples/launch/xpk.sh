#!/usr/bin/env bash
# One workload on a v4-32 (four hosts) of a GKE cluster that xpk made:
#   CLUSTER=my-cluster IMAGE=my-registry/llama-xla:1 docs/examples/launch/xpk.sh
# GKE sets TPU_WORKER_ID and TPU_WORKER_HOSTNAMES, from which llama-xla knows its rank. The JobSet ends all hosts when one fails.
set -euo pipefail

exec xpk workload create \
  --cluster "${CLUSTER:?the name of the cluster}" \
  --workload "${WORKLOAD:-llama-xla}" \
  --tpu-type v4-32 \
  --num-slices 1 \
  --docker-image "${IMAGE:?an image with the project installed}" \
  --env PJRT_DEVICE=TPU \
  --env WORLD_SIZE=4 \
  --command "llama-xla generate --ckpt_dir /checkpoints/llama-2-70b --tensor_parallel 16 --prompt 'Once upon a time'"
