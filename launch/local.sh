#!/usr/bin/env bash
# Starts one command as N processes on this host, as a cluster would: launch/local.sh 2 clipjax train ...
# Each process gets its own share of the GPUs in CUDA_VISIBLE_DEVICES, if that is set (on the CPU, set
# XLA_FLAGS=--xla_force_host_platform_device_count=<devices per process>). SIGTERM and Ctrl-C reach all of them.
# Exits with the first code that is not 0; when a process fails, the others get CLIPJAX_GRACE seconds.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: launch/local.sh PROCESSES COMMAND [ARGUMENTS...]" >&2
  exit 2
fi
processes=$1
shift
export JAX_NUM_PROCESSES=$processes
export JAX_COORDINATOR_ADDRESS=${JAX_COORDINATOR_ADDRESS:-localhost:$((20000 + RANDOM % 12000))}
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
share=$((${#gpus[@]} / processes))

pids=() reaper=
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
trap 'kill -KILL "${pids[@]}" $reaper 2>/dev/null || true' EXIT
for ((index = 0; index < processes; index++)); do
  if [ "$share" -gt 0 ]; then
    CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:index * share:share}")
    export CUDA_VISIBLE_DEVICES
  fi
  JAX_PROCESS_ID=$index "$@" &
  pids+=($!)
done

status=0 running=$processes
while [ "$running" -gt 0 ]; do
  code=0
  wait -n || code=$?
  if [ -n "$reaper" ] && ! kill -0 "$reaper" 2>/dev/null; then # their time is up
    kill -KILL "${pids[@]}" 2>/dev/null || true
    wait
    break
  fi
  alive=0
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then alive=$((alive + 1)); fi
  done
  [ "$alive" -lt "$running" ] || continue # a signal woke us up
  running=$alive
  if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
    status=$code
    (exec sleep "${CLIPJAX_GRACE:-60}") >/dev/null 2>&1 &
    reaper=$!
  fi
done
exit "$status"
