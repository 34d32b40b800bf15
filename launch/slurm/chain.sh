#!/usr/bin/env bash
# Submits a run as a chain of jobs, for clusters where a job cannot be queued again: each waits for the one before it and
# goes on if that has not finished the run. Prints the jobs' numbers.
#
#     bash launch/slurm/chain.sh NUMBER [options of sbatch --] CONFIG.yaml [key.sub=value ...]
mistake() { printf 'chain.sh: error: %s\n' "$*" >&2; exit 2; }

[[ ${1:-} =~ ^[1-9][0-9]*$ ]] ||
    mistake "${1:-no number}: chain.sh NUMBER [options of sbatch --] CONFIG.yaml [key.sub=value ...]"
number=$1
shift
options=()
for word in "$@"; do
    if [[ $word == -- ]]; then
        while [[ $1 != -- ]]; do options+=("$1"); shift; done
        shift
        break
    fi
done
(($# > 0)) || mistake "a config is needed: chain.sh NUMBER [options of sbatch --] CONFIG.yaml [key.sub=value ...]"

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd) || exit
export COE_HOME=${COE_HOME:-${here%/launch/slurm}}
COE_CHAIN=chain-$(date +%Y%m%d-%H%M%S)-$$ # what all jobs know together: attempts, and whether they led anywhere
export COE_CHAIN
after=()
for ((job = 0; job < number; job++)); do
    # A job that finishes the run ends well, so that those after it can never start, and SLURM removes them.
    id=$(sbatch --parsable --no-requeue "${after[@]}" "${options[@]}" "$here/pretrain.sbatch" "$@") || exit
    id=${id%%;*} # with several clusters, the cluster's name follows
    printf '%s\n' "$id"
    after=(--dependency="afternotok:$id" --kill-on-invalid-dep=yes)
done
