#!/usr/bin/env bash
# What srun starts for pretrain.sbatch: on each node torchrun, or as a task of its own each rank (COE_LAUNCH=tasks).
# The arguments are those of pretrain_coe.py. The environment is that of pretrain.sbatch with SLURM's variables of the task.

needed=(COE_ATTEMPT COE_HOME COE_LAUNCH COE_NODES COE_PYTHON COE_RANKS_PER_NODE MASTER_ADDR MASTER_PORT
    SLURM_JOB_ID SLURM_NODEID SLURM_PROCID SLURM_LOCALID SLURM_STEP_NUM_TASKS SLURMD_NODENAME)
for name in "${needed[@]}"; do
    [[ -n ${!name:-} ]] ||
        { printf 'step.sh: error: %s is not set: pretrain.sbatch and srun set it\n' "$name" >&2; exit 2; }
done

# SLURM sends TERM and USR1 to its tasks, with cgroups to nobody below them. The ranks learn of it through the stop file.
awoken=''
trap 'awoken=1; : >"$COE_ATTEMPT/stop"' TERM USR1

# Gloo and NCCL are told which interface leads to the other nodes; NCCL looks for the adapter that is near each GPU itself.
if ((COE_NODES > 1)); then
    neighbour=$MASTER_ADDR
    if ((SLURM_NODEID == 0)); then neighbour=$COE_NEIGHBOUR; fi
    if interface=$("$COE_PYTHON" -m coe_megatron.launcher.network towards "$neighbour"); then
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$interface} # with =, no other name that begins so
    fi
fi

program=("$COE_HOME/launch/pretrain_coe.py" --stop-file "$COE_ATTEMPT/stop" "$@")
node=node-$SLURM_NODEID

with_torchrun() {
    local options=(
        --nnodes="$COE_NODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$COE_RANKS_PER_NODE" --max-restarts=0
        --rdzv-backend=static --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT"
        --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
        --log-dir="$COE_ATTEMPT/ranks/$node" --redirects=3 --signals-to-handle=SIGINT
    )
    # Torchrun would kill its ranks 30 seconds after a TERM; they go on to the end of their step and save.
    trap '' TERM USR1
    if ((SLURM_NODEID == 0)); then # the job's log shows rank 0, without torchrun's words
        "$COE_PYTHON" -m coe_megatron.launcher.torchrun "${options[@]}" --tee=0:3 "${program[@]}" 2>&1 |
            tee "$COE_ATTEMPT/$node.log" | sed -un 's/^\[default0\]: \?//p'
        return "${PIPESTATUS[0]}"
    fi
    "$COE_PYTHON" -m coe_megatron.launcher.torchrun "${options[@]}" "${program[@]}" >"$COE_ATTEMPT/$node.log" 2>&1
}

as_rank() {
    local folder=$COE_ATTEMPT/ranks/$node/$SLURM_LOCALID
    mkdir -p "$folder"
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS GROUP_RANK=$SLURM_NODEID
    export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$COE_RANKS_PER_NODE
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} TORCHELASTIC_ERROR_FILE=$folder/error.json
    trap '' TERM USR1
    if ((SLURM_PROCID == 0)); then
        "$COE_PYTHON" "${program[@]}" > >(tee "$folder/stdout.log") 2> >(tee "$folder/stderr.log" >&2)
    else
        "$COE_PYTHON" "${program[@]}" >"$folder/stdout.log" 2>"$folder/stderr.log"
    fi
    local status=$? moment=${EPOCHREALTIME/,/.}
    printf '{"rank": %d, "status": %d, "time": %s, "host": "%s"}\n' \
        "$RANK" "$status" "$moment" "$SLURMD_NODENAME" >"$folder/ended.json"
    return "$status"
}

if [[ $COE_LAUNCH == torchrun ]]; then with_torchrun & else as_rank & fi
launched=$!
awoken=1
while [[ -n $awoken ]]; do # a signal ends the waiting, not what is waited for
    awoken=''
    wait "$launched"
    status=$?
done
exit "$status"
