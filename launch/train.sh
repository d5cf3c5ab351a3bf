#!/usr/bin/env bash
# Train on the ranks of this machine: bash launch/train.sh RANKS --config FILE [--set path=value ...] [--resume ...]
#
# Relative paths, those in FILE too, are taken from the folder in which this is started.
#
# SIGTERM or SIGINT to this script, to the launcher or to a rank: all ranks save, and the exit code is 0. Other exit
# codes: 2 for a configuration, checkpoint or data that cannot be used, 3 where a rank hangs or is gone (launch/faults.md),
# 1 for another failure.
set -euo pipefail

root="$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if (($# == 0)) || [[ ! "$1" =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: bash launch/train.sh RANKS --config FILE [--set path=value ...] [--resume auto|none|TAG]" >&2
    exit 2
fi
ranks=$1
shift
if [[ " $* " != *" --config"[=\ ]* ]]; then
    echo "train.sh: --config FILE is missing" >&2
    exit 2
fi
export PYTHONSAFEPATH=1 # a module, or the clone itself, in the folder of the start must not stand in for ours
bash "$root/launch/setup.sh"
export PATH="$root/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if ((gpus == 0)); then
    export DS_ACCELERATOR=cpu
elif ((gpus < ranks)) && [[ "${DS_ACCELERATOR:-}" != cpu ]]; then
    echo "train.sh: $ranks ranks, but this machine has $gpus GPUs; ask for at most $gpus, or set DS_ACCELERATOR=cpu" >&2
    exit 2
fi
if [[ -z "${PYTHON_DS_REMOE_RUN:-}" && "$(uname -s)" == Linux ]]; then
    # DeepSpeed's launcher alone dies of SIGTERM before its ranks have saved.
    exec ds-remoe supervise --max-restarts 0 --grace 3600 -- bash "$root/launch/train.sh" "$ranks" "$@"
fi
port=${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
exec deepspeed --quiet --num_gpus "$ranks" --master_port "$port" --module ds_remoe.train "$@"
