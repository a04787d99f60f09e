#!/usr/bin/env bash
# Starts one command as N processes on this host, as a cluster would: launch/local.sh 2 clipjax train ...
# Each process gets its own share of the devices from the caller's environment (CUDA_VISIBLE_DEVICES is
# split evenly when it is set; on the CPU use JAX_NUM_CPU_DEVICES=<devices per process>).
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: launch/local.sh PROCESSES COMMAND [ARGUMENTS...]" >&2
  exit 2
fi
processes=$1
shift
export JAX_NUM_PROCESSES=$processes
export JAX_COORDINATOR_ADDRESS=${JAX_COORDINATOR_ADDRESS:-localhost:$((20000 + RANDOM % 20000))}
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
share=$((${#gpus[@]} / processes))

pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((index = 0; index < processes; index++)); do
  if [ "$share" -gt 0 ]; then
    mine=$(IFS=,; echo "${gpus[*]:index * share:share}")
    CUDA_VISIBLE_DEVICES=$mine JAX_PROCESS_ID=$index "$@" &
  else
    JAX_PROCESS_ID=$index "$@" &
  fi
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
  wait "$pid" || status=$?
done
exit "$status"
