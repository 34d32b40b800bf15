"""The SLURM job of a run: what it starts where, and which rank each process becomes, on any number of nodes."""

from collections.abc import Iterator
from pathlib import Path

from coe_megatron.distributed.environment import DistributedEnv
from coe_megatron.errors import ConfigError
from coe_megatron.slurm.job import JobPlan
from coe_megatron.slurm.tasks import rank_variables, torchrun_options

LONGEST_ARGUMENT = 131_072  # bytes that Linux allows
_LAUNCHES = ("torchrun", "tasks")
_ATTEMPT = Path("logs/1/attempt-0")


def check_job(nodes: int, ranks_per_node: int) -> int:
    """Check that each rank is started once, with either launcher; the longest argument in bytes.

    Raises:
        ConfigError: a rank is missing or started twice, or a list of nodes is too long for a command.
    """
    names = [f"node-{number:05d}" for number in range(nodes)]
    longest = len(" ".join(names))  # of `slurm_job begin --nodes`
    if longest >= LONGEST_ARGUMENT:
        raise ConfigError(
            f"SLURM: the names of {nodes:,} nodes take {longest:,} bytes, an argument {LONGEST_ARGUMENT:,} at most"
        )
    for launch in _LAUNCHES:
        started = [process.rank for process in processes(names, ranks_per_node, launch)]
        if sorted(started) != list(range(nodes * ranks_per_node)):
            raise ConfigError(f"SLURM: COE_LAUNCH={launch} does not start each rank once")
    return longest


def processes(names: list[str], ranks_per_node: int, launch: str) -> Iterator[DistributedEnv]:
    """What every process of the job reads from its environment.

    Raises:
        ConfigError: a variable is invalid.
    """
    submitted = {"COE_LAUNCH": launch, "SLURM_GPUS_ON_NODE": str(ranks_per_node), "SLURM_CPUS_ON_NODE": "128"}
    plan = JobPlan.from_environment(names, submitted)
    job = {**plan.variables(), "SLURM_JOB_ID": "1", "MASTER_ADDR": names[0], "MASTER_PORT": "20000"}
    for task in _tasks(plan):
        if launch == "tasks":
            yield DistributedEnv.from_environment(job | rank_variables(job | task, _ATTEMPT))
        else:
            for variables in _torchrun(torchrun_options(job | task, _ATTEMPT)):
                yield DistributedEnv.from_environment(job | variables)


def _tasks(plan: JobPlan) -> Iterator[dict[str, str]]:
    """The tasks that srun starts with the plan's options: blocks of consecutive ones on a node."""
    options = dict(option.removeprefix("--").split("=") for option in plan.start_options())
    if options["distribution"] != "block":
        raise ConfigError(f"SLURM: srun distributes tasks by {options['distribution']}, not in blocks")
    tasks, on_node = int(options["ntasks"]), int(options["ntasks-per-node"])
    for task in range(tasks):
        node, local = divmod(task, on_node)
        yield {
            "SLURM_PROCID": str(task),
            "SLURM_NODEID": str(node),
            "SLURM_LOCALID": str(local),
            "SLURM_STEP_NUM_TASKS": str(tasks),
        }


def _torchrun(options: list[str]) -> Iterator[dict[str, str]]:
    """The variables that torchrun sets for the ranks of a node; with the static rendezvous nodes keep their order."""
    given = dict(option.removeprefix("--").split("=") for option in options)
    nodes, node, local_size = (int(given[name]) for name in ("nnodes", "node-rank", "nproc-per-node"))
    for local in range(local_size):
        yield {
            "RANK": str(node * local_size + local),
            "WORLD_SIZE": str(nodes * local_size),
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(local_size),
            "GROUP_RANK": str(node),
            "GROUP_WORLD_SIZE": str(nodes),
            "MASTER_ADDR": given["master-addr"],
            "MASTER_PORT": given["master-port"],
            "TORCHELASTIC_RUN_ID": given["rdzv-id"],
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
