#!/usr/bin/env bash
# Options of the compilers, by chip: those that public training stacks set, for overlapping communication with work.
#   launch/flags.sh v5e                    # two lines, NAME=VALUE
#   launch/flags.sh h100 XLA_FLAGS         # one value
#   export "$(launch/flags.sh v6e | head -n 1)"
# They are known to the compilers of jax 0.10.2 (libtpu 0.0.42). None changes a result beyond rounding. Compare with
# `clipjax bench step` before you keep one.
set -euo pipefail
chip=${1:-} name=${2:-}
tpu="--xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true \
--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true \
--xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true \
--xla_enable_async_collective_permute=true"
gpu="--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_pipelined_all_gather=true \
--xla_gpu_enable_pipelined_reduce_scatter=true --xla_gpu_enable_while_loop_double_buffering=true \
--xla_gpu_enable_highest_priority_async_stream=true --xla_gpu_all_gather_combine_threshold_bytes=134217728 \
--xla_gpu_reduce_scatter_combine_threshold_bytes=67108864 --xla_gpu_all_reduce_combine_threshold_bytes=134217728"
LIBTPU_INIT_ARGS='' XLA_FLAGS=''
case $chip in
  v4 | v5e | v5p) LIBTPU_INIT_ARGS=$tpu ;;
  # Its larger vector memory: what a fusion may take of it.
  v6e) LIBTPU_INIT_ARGS="$tpu --xla_tpu_scoped_vmem_limit_kib=98304" ;;
  a100 | h100 | h200 | b200) XLA_FLAGS=$gpu ;;
  *)
    echo "usage: launch/flags.sh v4|v5e|v5p|v6e|a100|h100|h200|b200 [LIBTPU_INIT_ARGS|XLA_FLAGS]" >&2
    exit 2
    ;;
esac
case $name in
  '') printf '%s\n' "LIBTPU_INIT_ARGS=$LIBTPU_INIT_ARGS" "XLA_FLAGS=$XLA_FLAGS" ;;
  LIBTPU_INIT_ARGS) printf '%s\n' "$LIBTPU_INIT_ARGS" ;;
  XLA_FLAGS) printf '%s\n' "$XLA_FLAGS" ;;
  *)
    echo "launch/flags.sh: no variable $name" >&2
    exit 2
    ;;
esac
