#!/usr/bin/env bash
# Train on the ranks of this machine: bash launch/train.sh RANKS --config FILE [--set path=value ...] [--resume ...]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if (($# == 0)) || [[ ! "$1" =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: bash launch/train.sh RANKS --config FILE [--set path=value ...] [--resume auto|none|TAG]" >&2
    exit 2
fi
ranks=$1
shift
bash launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if ((gpus == 0)); then
    export DS_ACCELERATOR=cpu
elif ((gpus < ranks)) && [[ "${DS_ACCELERATOR:-}" != cpu ]]; then
    echo "train.sh: $ranks ranks, but this machine has $gpus GPUs; ask for at most $gpus, or set DS_ACCELERATOR=cpu" >&2
    exit 2
fi
port=${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
exec deepspeed --quiet --num_gpus "$ranks" --master_port "$port" --module ds_remoe.train "$@"
