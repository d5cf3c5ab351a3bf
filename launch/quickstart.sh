#!/usr/bin/env bash
# From a fresh clone to a trained ReMoE: installs into .venv, prepares the embedded corpus, trains on two ranks.
# Run it again to continue a run that was stopped. Arguments go to the trainer, e.g. --set remoe.train.seed=1
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
exec bash launch/train.sh 2 --config ds_configs/quickstart.json "$@"
