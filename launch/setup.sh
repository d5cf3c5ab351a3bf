#!/usr/bin/env bash
# Make .venv in the repository and install ds_remoe into it, with the pinned packages of launch/constraints.txt.
#
#   bash launch/setup.sh        what training needs
#   bash launch/setup.sh dev    and the tools of launch/test.sh
#   bash launch/setup.sh rivals and, for a GPU with nvcc, scattermoe and megablocks, which `ds-remoe bench layer` times
#
# Returns at once when that was done before and neither pyproject.toml nor constraints.txt has changed since.
# PYTHON=/path/to/python chooses the interpreter, which must be 3.11 or newer.
set -euo pipefail

root="$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
extra="${1:-}"
venv="$root/.venv"
stamp="$venv/.ds_remoe_setup"

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

case "$extra" in
    '' | dev | rivals) ;;
    *) die "unknown argument '$extra'; give 'dev', 'rivals' or nothing" ;;
esac

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
        [[ "$candidate" != "${PYTHON:-}" ]] || die "PYTHON=$PYTHON is not a Python 3.11 or newer"
    done
    die "found no Python 3.11 or newer; install one, or name it: PYTHON=/path/to/python bash launch/setup.sh"
}

# Nodes that share the folder may all come here at once; one makes .venv, the others find it made.
if command -v flock >/dev/null 2>&1 && (: >>"$root/.venv.lock") 2>/dev/null; then
    exec 9>>"$root/.venv.lock"
    flock 9 || say "$root has no file locks; run this on one node first"
fi

if ! "$venv/bin/python" -c '' >/dev/null 2>&1; then
    python="$(find_python)"
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        die "$python has no venv module; install it (Debian and Ubuntu: apt install python3-venv)"
    say "making .venv with $("$python" --version), $python"
    "$python" -m venv --clear "$venv"
fi

# The stamp holds what was installed; the folder belongs to it, because a moved editable install points nowhere.
state="$("$venv/bin/python" - "$root" <<'PY'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(str(root.resolve()).encode())
for name in ("pyproject.toml", "launch/constraints.txt"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
PY
)"
installed="$(cat "$stamp" 2>/dev/null || true)"
case "$installed" in
    "$state rivals" | "$state $extra") exit 0 ;;
    "$state dev") [[ "$extra" == rivals ]] || exit 0 ;;
esac

# On Linux, PyPI's torch brings gigabytes of CUDA libraries; a machine without a GPU takes torch's CPU build instead.
torch_cpu=https://download.pytorch.org/whl/cpu
index=()
if [[ "$(uname -s)" == Linux ]] && ! command -v nvidia-smi >/dev/null 2>&1 &&
    "$venv/bin/python" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1] + "/torch/", timeout=5)' \
        "$torch_cpu" >/dev/null 2>&1; then
    index=(--extra-index-url "$torch_cpu")
fi

pip_install() {
    "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off "$@" >>"$venv/pip.log" 2>&1
}
ds_remoe=(${index[@]+"${index[@]}"} --constraint "$root/launch/constraints.txt" --editable)

say "installing ds_remoe${extra:+ and its $extra tools} (some minutes the first time)"
rm -f "$stamp" "$venv/pip.log"
tools="${extra/rivals/dev}"
if ! pip_install "${ds_remoe[@]}" "$root${tools:+[$tools]}"; then
    tail -n 20 "$venv/pip.log" >&2
    die "pip could not install the packages; all of its output is in $venv/pip.log"
fi

# A rival that cannot be had is no reason to go without the rest; the next call tries again.
left_out() {
    say "$1 is left out: $2"
    extra=dev
}
if [[ "$extra" == rivals ]]; then
    pip_install "${ds_remoe[@]}" "${root}[dev,rivals]" || left_out scattermoe "pip could not install it, see $venv/pip.log"
    if ! "$venv/bin/python" -c 'import sys, torch, torch.utils.cpp_extension as cpp
sys.exit(not (torch.cuda.is_available() and cpp.CUDA_HOME))'; then
        left_out megablocks "it is compiled here, which needs a GPU, torch's CUDA build and nvcc"
    # Without their pins, and compiled against the torch that is here.
    elif ! pip_install --no-deps --no-build-isolation stanford-stk==0.7.1 grouped_gemm==0.3.0 megablocks==0.10.0; then
        left_out megablocks "pip could not install it, see $venv/pip.log"
    fi
fi
printf '%s %s\n' "$state" "$extra" >"$stamp"
say "done: $("$venv/bin/python" -c 'from importlib.metadata import version as v
print(", ".join(f"{name} {v(name)}" for name in ("torch", "deepspeed")))')"
say "for ds-remoe, deepspeed and python in this shell: source $venv/bin/activate"
