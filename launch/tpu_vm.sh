#!/usr/bin/env bash
# A run on every worker of a TPU slice, as a service of each machine: it outlives this shell and its connection.
#   launch/tpu_vm.sh start NAME ZONE configs/my_run.py --workdir gs://bucket/runs/my_run
#   launch/tpu_vm.sh status|logs|stop NAME ZONE
# `stop` saves first. systemd starts the command again after any end that may be tried again (exit codes 69, 75, 76,
# a crash, a reboot), never after 1 or 2. Each worker needs the tree in ~/clipjax with a .venv: pip install --editable
# '.[gcs]' 'jax[tpu]', by a start-up script or once by hand.
# CLIPJAX_CHIP (such as v5e) takes the compiler's options of launch/flags.sh.
set -euo pipefail
usage="usage: launch/tpu_vm.sh start TPU_NAME ZONE CONFIG [OPTIONS...] | status|logs|stop TPU_NAME ZONE"
if [ $# -lt 3 ]; then
  echo "$usage" >&2
  exit 2
fi
action=$1 name=$2 zone=$3
shift 3
on_workers() {
  gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"
}
case $action in
  start)
    if [ $# -lt 1 ]; then
      echo "$usage" >&2
      exit 2
    fi
    printf -v options ' %q' "$@"
    flags=
    if [ -n "${CLIPJAX_CHIP:-}" ]; then
      flags=$("$(dirname "$0")/flags.sh" "$CLIPJAX_CHIP" LIBTPU_INIT_ARGS)
    fi
    printf -v environment '%q' "LIBTPU_INIT_ARGS=$flags"
    # One unit of this name at a time: a second start is refused by systemd.
    on_workers "sudo systemd-run --unit=clipjax --uid=\$(id -u) --working-directory=\$HOME/clipjax \
--setenv=HOME=\$HOME --setenv=$environment --property=Restart=on-failure --property=RestartSec=30 \
--property=RestartPreventExitStatus='1 2' --property=StartLimitIntervalSec=0 --property=TimeoutStopSec=300 \
--property=KillSignal=SIGTERM \$HOME/clipjax/.venv/bin/clipjax train$options"
    ;;
  status) on_workers "systemctl show clipjax --property=ActiveState,SubState,ExecMainStatus,NRestarts" ;;
  logs) on_workers "sudo journalctl --unit=clipjax --lines=100 --no-pager" ;;
  stop) on_workers "sudo systemctl stop clipjax" ;;
  *)
    echo "$usage" >&2
    exit 2
    ;;
esac
