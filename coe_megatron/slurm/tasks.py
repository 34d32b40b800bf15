"""What a task of srun starts: options of torchrun on its node, or the variables of its rank. Without torch."""

from collections.abc import Mapping
from pathlib import Path


def torchrun_options(environment: Mapping[str, str], attempt: Path) -> list[str]:
    """Options of torchrun on a node; the job's log shows the output of rank 0.

    Args:
        environment: of the task, which pretrain.sbatch and srun set.
        attempt: the folder of the attempt's logs.
    """
    env, node = environment, int(environment["SLURM_NODEID"])
    return [
        f"--nnodes={env['COE_NODES']}",
        f"--node-rank={node}",
        f"--nproc-per-node={env['COE_RANKS_PER_NODE']}",
        "--max-restarts=0",
        "--rdzv-backend=static",
        f"--rdzv-id={env['SLURM_JOB_ID']}-{env.get('SLURM_RESTART_COUNT', 0)}",
        f"--master-addr={env['MASTER_ADDR']}",
        f"--master-port={env['MASTER_PORT']}",
        f"--log-dir={attempt}/ranks/node-{node}",
        "--redirects=3",
        "--signals-to-handle=SIGINT",
        *(("--tee=0:3",) if node == 0 else ()),
    ]


def rank_variables(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The variables of a rank that srun starts by itself.

    Args:
        environment: as above.
        folder: of the rank's logs.
    """
    env = environment
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "GROUP_RANK": str(int(env["SLURM_NODEID"])),
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": env["COE_RANKS_PER_NODE"],
        "OMP_NUM_THREADS": env.get("OMP_NUM_THREADS") or env.get("SLURM_CPUS_PER_TASK") or "1",
        "TORCHELASTIC_ERROR_FILE": str(folder / "error.json"),
    }
