#!/usr/bin/env bash
# From a fresh clone to a trained ReMoE: installs into .venv, prepares the embedded corpus, trains on two ranks.
# Run it again to continue a run that was stopped. Arguments go to the trainer, e.g. --set remoe.train.seed=1
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
if [[ "$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')" == 1 ]]; then
    export DS_ACCELERATOR=cpu # two ranks show expert parallelism; one GPU holds one rank
fi
exec bash launch/train.sh 2 --config ds_configs/quickstart.json "$@"
