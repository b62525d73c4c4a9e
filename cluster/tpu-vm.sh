#!/usr/bin/env bash
# Trains on all workers of a slice of Cloud TPU VMs; arguments are passed to launch.py. The script requests a spot slice,
# requests another one if the slice is preempted, and deletes the slice at the end. Run it on a machine that stays on for
# days (tmux on a small machine):
#
#   NAME=alexnet ZONE=us-east5-b TYPE=v6e-16 RUNTIME=v2-alpha-tpuv6e NFS=10.0.0.2:/share \
#   REPOSITORY=https://github.com/YOU/alexnet_jax \
#     cluster/tpu-vm.sh --config=configs/imagenet.py --config.data.data_dir=/shared/data --workdir=/shared/runs/a
#
# NFS is a file system that all workers reach and that outlives them (Filestore); it is mounted at /shared.
set -euo pipefail
: "${NAME:?}" "${ZONE:?}" "${TYPE:?}" "${RUNTIME:?}" "${NFS:?}" "${REPOSITORY:?}" "${SECONDS_BETWEEN_LOOKS:=30}"

queue() { gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }
state() {
  local answer
  if answer=$(queue describe --format='value(state.state)' 2>&1); then
    echo "$answer"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo MISSING
  else
    echo "$answer" >&2 # a network error, for example: the state is queried again
    echo UNKNOWN
  fi
}
on_all_workers() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

printf -v arguments ' %q' "$@"
setup="set -e
sudo apt-get install --yes nfs-common
sudo mkdir -p /shared
mountpoint -q /shared || sudo mount -t nfs $NFS /shared
[ -d alexnet_jax ] || git clone $REPOSITORY alexnet_jax
cd alexnet_jax
pip install --user uv
~/.local/bin/uv venv --allow-existing --python=3.13 .venv
~/.local/bin/uv pip install --python=.venv/bin/python --constraint=requirements.txt --editable '.[tpu]'"
# 75: preempted, with a checkpoint written, on all workers at once.
train="cd alexnet_jax
while .venv/bin/python launch.py --distributed$arguments; code=\$?; [ \$code = 75 ]; do :; done
exit \$code"

while true; do
  case $(state) in
    ACTIVE)
      if on_all_workers "$setup" && on_all_workers "$train"; then
        queue delete --quiet --force
        exit 0
      fi
      sleep "$SECONDS_BETWEEN_LOOKS"
      if [[ $(state) == ACTIVE ]]; then
        echo "$NAME failed and is kept: inspect it, then delete it" >&2
        exit 1
      fi
      ;;
    FAILED | SUSPENDED) queue delete --quiet --force ;;
    MISSING) queue create --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" --spot ;;
    *) sleep "$SECONDS_BETWEEN_LOOKS" ;; # waiting, being created or deleted
  esac
done
