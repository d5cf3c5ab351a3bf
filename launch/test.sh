#!/usr/bin/env bash
# Lint, type-check and test the repository. Arguments go to pytest: bash launch/test.sh tests/test_cli.py -x
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh dev
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    export DS_ACCELERATOR=cpu
fi

failed=()
check() {
    printf '\n==> %s\n' "$*"
    "$@" || failed+=("$1")
}
check ruff check .
check ruff format --check .
check mypy
if ((${#failed[@]})); then
    printf '\nfailed: %s\n' "${failed[*]}"
fi
check pytest "$@"
((${#failed[@]} == 0))
