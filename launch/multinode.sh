#!/usr/bin/env bash
# Train on several nodes.
#
#   bash launch/multinode.sh --hostfile FILE [options] --config FILE [--set path=value ...] [--resume ...]
#       from one machine, through pdsh and ssh
#   bash launch/multinode.sh --hostfile FILE --no_ssh [--node_rank I] [options] --config FILE ...
#       once on each node, by a scheduler that starts one task a node (launch/slurm.sbatch does so)
#
# Options, before --config; what follows goes to the trainer:
#   --hostfile FILE     the nodes, as in launch/hostfile.example
#   --master_addr A     address of the first node that all others reach. Default: with ssh what `hostname -I` says first
#                       there; with --no_ssh the first name of the hostfile
#   --master_port P     free on the first node; default 29500, or MASTER_PORT
#   --node_rank I       with --no_ssh: this node's line in the hostfile, from 0; default: SLURM_NODEID
#   --launcher L        pdsh (default), openmpi, mpich, impi, mvapich or slurm, as `deepspeed --launcher`
#   --export NAMES      forward these variables too, separated by commas
#   --skip_checks       start without the look at the nodes (`ds-remoe doctor`, some seconds), which refuses what would
#                       hang or go wrong; with --no_ssh there is none
#
# SIGTERM or SIGINT to this script, to deepspeed or to a rank: all ranks save, and the exit code is 0. Other exit codes:
# 2 for a configuration, checkpoint or data that cannot be used, 3 where a rank hangs or is gone (launch/faults.md), 1 for
# another failure. To restart after a failure:
#   ds-remoe supervise -- bash launch/multinode.sh ...
#
# Relative paths, those in the configuration too, are taken from the folder in which this is started.
#
# What it needs on every node: this repository at this same path with the same .venv (a shared file system, or a clone
# and `bash launch/setup.sh` on each), the folder in which this is started, and remoe.train.output_dir and
# remoe.data.cache_dir on a file system that all nodes share. With ssh: pdsh here, and ssh to each node without a
# password (deepspeed asks nobody). Host names must not resolve to 127.*: Debian's `127.0.1.1 NAME` in /etc/hosts does;
# set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network interface where it does, or where a node has several.
# `ds-remoe doctor --hostfile FILE` looks into all of it.
#
# Environment: pdsh forwards next to nothing by itself. This script forwards PATH and LD_LIBRARY_PATH, OMP_NUM_THREADS,
# DS_ACCELERATOR, DEEPSPEED_TIMEOUT, proxies, and all of NCCL_*, GLOO_*, TORCH_*, TRITON_*, FI_*, DS_REMOE_*, HF_* and
# WANDB_*, then the lines NAME=VALUE of .deepspeed_env in the home and in this repository (or of DS_ENV_FILE), which
# win; blank lines and comments, at which deepspeed itself ends with an exception, are left out. All that stands in the
# command line of a process on each node, for every user there to see; so nothing whose name ends in KEY, TOKEN, SECRET
# or PASSWORD goes along: log in on the nodes instead (`wandb login`, `hf auth login`).
set -euo pipefail

die() { printf 'multinode.sh: %s\n' "$*" >&2; exit 2; }

root="$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
hostfile='' master_addr='' master_port="${MASTER_PORT:-29500}" node_rank="${SLURM_NODEID:-}" launcher=pdsh export_names=''
ssh=1 checks=1 given=("$@")
while (($#)); do
    case "$1" in
        --no_ssh) ssh=0; shift; continue ;;
        --skip_checks) checks=0; shift; continue ;;
        --hostfile | --master_addr | --master_port | --node_rank | --launcher | --export) ;;
        *) break ;;
    esac
    (($# > 1)) || die "$1 needs a value"
    case "$1" in
        --hostfile) hostfile=$2 ;;
        --master_addr) master_addr=$2 ;;
        --master_port) master_port=$2 ;;
        --node_rank) node_rank=$2 ;;
        --launcher) launcher=$2 ;;
        --export) export_names=$2 ;;
    esac
    shift 2
done
[[ -n "$hostfile" ]] || die "--hostfile FILE is missing; launch/hostfile.example is one"
[[ -f "$hostfile" ]] || die "--hostfile $hostfile: no such file (relative to $PWD)" # deepspeed would train here alone
[[ " $* " == *" --config"[=\ ]* ]] || die "nothing for the trainer: add --config FILE"
if [[ ! "$master_port" =~ ^[1-9][0-9]{0,4}$ ]] || ((master_port > 65535)); then
    die "--master_port $master_port: must be between 1 and 65535"
fi

export PYTHONSAFEPATH=1 # a module, or the clone itself, in the folder of the start must not stand in for ours
bash "$root/launch/setup.sh"
export PATH="$root/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
DS_REMOE_HOSTFILE=$(realpath "$hostfile") # for the command that the trainer prints at the end
export DS_REMOE_HOSTFILE

if [[ -z "${PYTHON_DS_REMOE_RUN:-}" && "$(uname -s)" == Linux ]]; then
    # DeepSpeed's launcher alone, asked to stop, cuts the ranks off before they have saved.
    exec ds-remoe supervise --max-restarts 0 --grace 3600 -- bash "$root/launch/multinode.sh" "${given[@]}"
fi

# DeepSpeed puts the folder of the start first into the nodes' PYTHONPATH, so that what lies there would stand in for
# our modules; what `forwarded` says comes after, and holds.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

if ((!ssh)); then
    [[ "$node_rank" =~ ^[0-9]+$ ]] || die "--no_ssh needs --node_rank I, or SLURM_NODEID (found '$node_rank')"
    # The first line that names a node: neither blank nor a comment.
    [[ -n "$master_addr" ]] || master_addr=$(sed -n '/^[[:space:]]*[^#[:space:]]/{s/^[[:space:]]*//;s/[[:space:]].*//p;q}' "$hostfile")
    exec deepspeed --quiet --hostfile "$hostfile" --no_ssh --node_rank "$node_rank" \
        --master_addr "$master_addr" --master_port "$master_port" --module ds_remoe.train "$@"
fi

if [[ "$launcher" == pdsh ]] && ! command -v pdsh >/dev/null; then
    die "pdsh is not installed here (Debian and Ubuntu: apt install pdsh); or --launcher openmpi, or --no_ssh on each node"
fi
for folder in "$PWD" "$root"; do
    [[ "$launcher" != pdsh || ! "$folder" =~ [^[:alnum:]/._,:@+=-] ]] ||
        die "$folder: deepspeed would hand this folder's name to pdsh without quotes; use one without spaces and signs"
done

# What a remote shell would change on its way is refused rather than passed on changed.
forwarded() {
    local name value
    while IFS= read -r name; do
        case "$name" in
            *KEY | *TOKEN | *SECRET | *PASSWORD) continue ;;
            PATH | PYTHONPATH | LD_LIBRARY_PATH | OMP_NUM_THREADS | DS_ACCELERATOR | DEEPSPEED_TIMEOUT) ;;
            http_proxy | https_proxy | no_proxy | HTTP_PROXY | HTTPS_PROXY | NO_PROXY) ;;
            NCCL_* | GLOO_* | TORCH_* | TRITON_* | FI_* | DS_REMOE_* | HF_* | WANDB_*) ;;
            *) [[ ",$export_names," == *",$name,"* ]] || continue ;;
        esac
        value=${!name}
        [[ ! "$value" =~ [\"\$\`\\%]|$'\n' ]] ||
            die "$name = $value: has one of \" \$ \` \\ % or a line break, which does not survive pdsh; unset it here and set it on the nodes"
        printf '%s=%s\n' "$name" "$value"
    done < <(compgen -e)
    # deepspeed's parser ends at a blank line or a comment with an exception.
    local file line files=(~/.deepspeed_env "$root/.deepspeed_env")
    [[ -z "${DS_ENV_FILE:-}" ]] || files=("$DS_ENV_FILE")
    for file in "${files[@]}"; do
        [[ -f "$file" ]] || continue
        while IFS= read -r line || [[ -n "$line" ]]; do
            [[ "$line" =~ ^[[:space:]]*(#|$) ]] && continue
            [[ "$line" =~ ^[[:space:]]*[A-Za-z_][A-Za-z0-9_]*= ]] || die "$file: the line '$line' is not NAME=VALUE"
            printf '%s\n' "$line"
        done <"$file"
    done
}
environment=$(forwarded)

if ((checks)); then
    wanted=(--hostfile "$hostfile" --master_port "$master_port" ${master_addr:+--master_addr "$master_addr"})
    previous=''
    for argument in "$@"; do
        case "$previous" in --config | --set) wanted+=("$previous" "$argument") ;; esac
        case "$argument" in --config=* | --set=*) wanted+=("$argument") ;; esac
        previous=$argument
    done
    ds-remoe doctor --brief "${wanted[@]}" || {
        code=$?
        echo "multinode.sh: not started; mend what the doctor names, or --skip_checks" >&2
        exit "$code"
    }
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
printf '%s\n' "$environment" >"$scratch/environment"
export DS_ENV_FILE="$scratch/environment"

# pdsh hands the command to each node's shell as one text; deepspeed quotes only what has spaces, and that not well.
arguments=()
for argument in "$@"; do
    if [[ "$launcher" == pdsh ]]; then
        [[ ! "$argument" =~ %[hun]|[[:cntrl:]] ]] || die "argument $argument: pdsh would replace %h, %u or %n in it, or lose a control character; write it into the --config file"
        argument=$(printf '%q' "$argument")
        argument=${argument//'\ '/"\$'\\x20'"}
    fi
    arguments+=("$argument")
done

# ssh to a node that no longer answers would never end, and pdsh waits for all of them.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:--oServerAliveInterval=15 -oServerAliveCountMax=4}"

{ # read as a whole, as this file may change while the run lasts
    deepspeed --quiet --hostfile "$hostfile" --launcher "$launcher" ${master_addr:+--master_addr "$master_addr"} \
        --master_port "$master_port" --module ds_remoe.train "${arguments[@]}" &
    child=$!
    # Not exec: the scratch folder goes at the end. A signal is passed on, and its outcome is waited for.
    trap 'kill -TERM "$child" 2>/dev/null || true' TERM INT
    code=0
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    exit "$code"
}
