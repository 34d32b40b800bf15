#!/usr/bin/env bash
# Submits a run as a chain of jobs, for clusters where jobs cannot be requeued: each job waits for the one before it,
# and resumes the run if it is not finished. Prints the job ids.
#
#     bash launch/slurm/chain.sh NUMBER [options of sbatch --] CONFIG.yaml [key.sub=value ...]
#
# NUMBER is from 1 to 1000. If sbatch refuses a job, the earlier jobs stay submitted, and a line on stderr lists them.
max_jobs=1000
usage="chain.sh NUMBER [options of sbatch --] CONFIG.yaml [key.sub=value ...], NUMBER from 1 to $max_jobs"
mistake() { printf 'chain.sh: error: %s\n' "$*" >&2; exit 2; }

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    printf 'usage: %s\n' "$usage"
    sed -n '2,/^max_jobs=/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
[[ ${1:-} =~ ^[1-9][0-9]{0,3}$ && $1 -le max_jobs ]] || mistake "${1:-no number}: $usage"
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
COE_CHAIN=chain-$(date +%Y%m%d-%H%M%S)-$$ # the folder that all jobs share for attempts.json and logs
export COE_CHAIN
after=() submitted=()
failed() { # exits with this status, after a line on the jobs submitted so far
    ((${#submitted[@]} == 0)) ||
        printf 'chain.sh: error: sbatch accepted %d of %d jobs: %s; to cancel them: scancel %s\n' \
            "${#submitted[@]}" "$number" "${submitted[*]}" "${submitted[*]}" >&2
    exit "$1"
}
for ((job = 0; job < number; job++)); do
    # After the job that finishes the run (status 0), the dependency of the next job can never be met: SLURM removes it.
    id=$(sbatch --parsable --no-requeue "${after[@]}" "${options[@]}" "$here/pretrain.sbatch" "$@") || failed "$?"
    id=${id%%;*} # without the cluster's name, which follows if there are several clusters
    [[ $id =~ ^[0-9]+$ ]] || { printf 'chain.sh: error: sbatch printed no job id\n' >&2; failed 1; }
    submitted+=("$id")
    printf '%s\n' "$id"
    after=(--dependency="afternotok:$id" --kill-on-invalid-dep=yes)
done
