#!/usr/bin/env bash
# Submits a run as a chain of jobs, for clusters where a job cannot be queued again: each waits for the one before it and
# goes on if that has not finished the run. Prints the jobs' numbers.
#
#     bash launch/slurm/chain.sh NUMBER [options of sbatch --] CONFIG.yaml [key.sub=value ...]
#
# NUMBER is from 1 to 1000. When sbatch refuses a job, those before it stay, and a line on stderr names them.
most=1000
usage="chain.sh NUMBER [options of sbatch --] CONFIG.yaml [key.sub=value ...], NUMBER from 1 to $most"
mistake() { printf 'chain.sh: error: %s\n' "$*" >&2; exit 2; }

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    printf 'usage: %s\n' "$usage"
    sed -n '2,/^most=/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
[[ ${1:-} =~ ^[1-9][0-9]{0,3}$ && $1 -le most ]] || mistake "${1:-no number}: $usage"
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
(($# > 0)) || mistake "a config is needed: $usage"

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P) || exit
if [[ -z ${COE_HOME:-} && $here == */launch/slurm ]]; then export COE_HOME=${here%/launch/slurm}; fi # a checkout
COE_CHAIN=chain-$(date +%Y%m%d-%H%M%S)-$$ # what all jobs know together: attempts, and whether they led anywhere
export COE_CHAIN
after=() submitted=()
failed() { # with sbatch's status, and a line of its own on what is there already
    ((${#submitted[@]} == 0)) ||
        printf 'chain.sh: error: sbatch has taken %d of %d jobs: %s; to remove them: scancel %s\n' \
            "${#submitted[@]}" "$number" "${submitted[*]}" "${submitted[*]}" >&2
    exit "$1"
}
for ((job = 0; job < number; job++)); do
    # A job that finishes the run ends well, so that those after it can never start, and SLURM removes them.
    id=$(sbatch --parsable --no-requeue "${after[@]}" "${options[@]}" "$here/pretrain.sbatch" "$@") || failed "$?"
    id=${id%%;*} # with several clusters, the cluster's name follows
    [[ $id =~ ^[0-9]+$ ]] || { printf 'chain.sh: error: sbatch has printed no number of a job\n' >&2; failed 1; }
    submitted+=("$id")
    printf '%s\n' "$id"
    after=(--dependency="afternotok:$id" --kill-on-invalid-dep=yes)
done
