#!/usr/bin/env bash
# Runs the same command on every worker of a TPU slice: launch/tpu_vm.sh NAME ZONE configs/my_run.py --workdir /shared/runs/my_run
# Each worker needs the tree in ~/clipjax with a .venv: pip install --editable . 'jax[tpu]' (by a start-up script, or
# once through the same `gcloud compute tpus tpu-vm ssh --worker=all --command`), and a --workdir that all share.
set -euo pipefail
if [ $# -lt 3 ]; then
  echo "usage: launch/tpu_vm.sh TPU_NAME ZONE CONFIG [OPTIONS...]" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
printf -v options ' %q' "$@"
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all \
  --command "cd clipjax && .venv/bin/clipjax train$options"
