#!/usr/bin/env bash
# On a machine with a GPU: the kernels' tests on it, their times, the layer against its rivals, a short run over NCCL.
#
#   bash launch/gpu_check.sh [FOLDER]     default: runs/gpu_check
#
# Uses python3 as it is where that imports ds_remoe's packages (a cluster's own environment), else makes .venv. Results
# files go into FOLDER, which must not exist; the exit code is 1 if a step failed, 2 if there is no GPU.
set -uo pipefail

root="$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || exit 1
folder=${1:-$root/runs/gpu_check}
[[ "$folder" == /* ]] || folder="$PWD/$folder"
cd "$root" || exit 1
if [[ -e "$folder" ]]; then
    echo "gpu_check.sh: $folder exists; move it away, or name another folder" >&2
    exit 2
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if ! python3 -c 'import datasets, deepspeed, pydantic, pytest, sentencepiece, triton' >/dev/null 2>&1; then
    bash launch/setup.sh rivals || exit 1
    export PATH="$PWD/.venv/bin:$PATH"
fi
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())') || exit 1
if ((gpus == 0)); then
    echo "gpu_check.sh: torch finds no CUDA device; run this on a machine with a GPU and torch's CUDA build" >&2
    exit 2
fi
mkdir -p "$folder" || exit 1

failed=()
step() {
    local name=$1
    shift
    printf '\n==> %s: %s\n' "$name" "$*"
    "$@" 2>&1 | tee "$folder/$name.log" || failed+=("$name")
}
ds_remoe() { python3 -m ds_remoe.cli "$@"; }

step tests python3 -m pytest -q -rs tests/test_kernels*.py
step kernels ds_remoe bench kernels --output "$folder/kernels.json"
step layer ds_remoe bench layer --widths 182M 469M 978M --tokens 16384 --output "$folder/layer.json"
step data ds_remoe data prepare ds_configs/quickstart.json
step step ds_remoe bench step ds_configs/quickstart.json --settle 170 --repeats 20 --output "$folder/step.json"
ranks=$((gpus < 2 ? 1 : 2))
step train python3 -m deepspeed.launcher.runner --num_gpus "$ranks" --module ds_remoe.train \
    --config ds_configs/quickstart.json --set "remoe.moe.ep_size=$ranks" --set remoe.train.steps=200 \
    --set scheduler.params.total_num_steps=200 --set "remoe.train.output_dir=$folder/run"

if ((${#failed[@]})); then
    printf '\ngpu_check.sh: failed: %s; see %s/*.log\n' "${failed[*]}" "$folder" >&2
    exit 1
fi
printf '\ngpu_check.sh: all steps done; results in %s\n' "$folder"
