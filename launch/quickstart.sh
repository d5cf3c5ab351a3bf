#!/usr/bin/env bash
# From a fresh clone to a trained ReMoE: installs into .venv, prepares the embedded corpus, trains on two ranks.
# The run lies in runs/quickstart of the folder in which this is started; run it there again to continue one that was
# stopped. Arguments go to the trainer, e.g. --set remoe.train.seed=1
set -euo pipefail

root="$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/launch/setup.sh"
if [[ "$("$root/.venv/bin/python" -P -c 'import torch; print(torch.cuda.device_count())')" == 1 ]]; then
    export DS_ACCELERATOR=cpu # two ranks show expert parallelism; one GPU holds one rank
fi
config=ds_configs/quickstart.json
[[ "$PWD" -ef "$root" ]] || config="$root/$config"
exec bash "$root/launch/train.sh" 2 --config "$config" "$@"
