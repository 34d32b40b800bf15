"""Plans the start of a job's ranks: checked variables, options of srun, the rendezvous port. Without torch.

launch/slurm/pretrain.sbatch calls SLURM's own programs, which may be missing in a container. Everything else is here,
called through `python -m coe_megatron.cli.slurm_job`.
"""

import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

from coe_megatron.distributed.environment import whole_number
from coe_megatron.errors import ConfigError

_COUNT = re.compile(r"0|[1-9][0-9]{0,5}", re.ASCII)
_LARGEST_ID = (1 << 32) - 1
_FIRST_PORT, _PAIRS = 20_000, 6_000  # below 32768, where Linux's ephemeral ports begin
_PAIRS_PER_JOB = 8  # so that consecutive starts of a job have different ports
_MAX_TRIES = 1_000


@dataclass(frozen=True)
class JobPlan:
    """How a job uses its nodes.

    Attributes:
        nodes: number of the job's nodes, including spare ones.
        needed: number of nodes that the run uses.
        ranks_per_node: COE_RANKS_PER_NODE, else one rank per GPU.
        launch: `torchrun` (one task per node) or `tasks` (one task per rank).
        check: whether all nodes are checked first.
        cpus: CPUs of a node that are allocated to the job.
    """

    nodes: int
    needed: int
    ranks_per_node: int
    launch: Literal["torchrun", "tasks"]
    check: bool
    cpus: int

    @classmethod
    def from_environment(cls, nodes: Sequence[str], environment: Mapping[str, str]) -> "JobPlan":
        """The plan from SLURM's variables and the user's (COE_...).

        Args:
            nodes: SLURM's names of the job's nodes.

        Raises:
            ConfigError: one line that names the variable, its value and what would be valid.
        """
        if not nodes:
            node_list = environment.get("SLURM_JOB_NODELIST", "not set")
            raise ConfigError(f"SLURM_JOB_NODELIST is {node_list}: scontrol knows no such nodes")
        launch = environment.get("COE_LAUNCH") or "torchrun"
        if launch not in ("torchrun", "tasks"):
            valid = "torchrun (one task per node) or tasks (one task per rank)"
            raise ConfigError(f"COE_LAUNCH is {launch}: it must be {valid}")
        ranks = environment.get("COE_RANKS_PER_NODE") or environment.get("SLURM_GPUS_ON_NODE") or "1"
        if not _COUNT.fullmatch(ranks) or ranks == "0":
            raise ConfigError(f"COE_RANKS_PER_NODE is {ranks}: it must be a number from 1 to 999999")
        check = environment.get("COE_CHECK_NODES") or "1"
        if check not in ("0", "1"):
            raise ConfigError(f"COE_CHECK_NODES is {check}: it must be 0 or 1")
        spare = environment.get("COE_SPARE_NODES") or "0"
        if not _COUNT.fullmatch(spare) or int(spare) >= len(nodes):
            raise ConfigError(f"COE_SPARE_NODES is {spare}: it must be less than the number of nodes, {len(nodes)}")
        if not (cpus := environment.get("SLURM_CPUS_ON_NODE")):
            raise ConfigError("SLURM_CPUS_ON_NODE is not set, though SLURM_JOB_NODELIST is: this is for sbatch")
        return cls(
            nodes=len(nodes),
            needed=len(nodes) - int(spare),
            ranks_per_node=int(ranks),
            launch="torchrun" if launch == "torchrun" else "tasks",
            check=check == "1",
            cpus=whole_number("SLURM_CPUS_ON_NODE", cpus, 1, _LARGEST_ID),
        )

    @property
    def ranks(self) -> int:
        return self.needed * self.ranks_per_node

    def variables(self) -> dict[str, str]:
        """What the job script exports of the plan."""
        return {
            "COE_LAUNCH": self.launch,
            "COE_NODES": str(self.needed),
            "COE_RANKS_PER_NODE": str(self.ranks_per_node),
            "COE_CHECK_OPTIONS": " ".join(self.check_options()),
            "COE_START_OPTIONS": " ".join(self.start_options()),
        }

    def check_options(self) -> list[str]:
        """Options of the srun that checks all nodes; empty if the check is switched off."""
        if not self.check:
            return []
        return [f"--nodes={self.nodes}", f"--ntasks={self.nodes}", "--ntasks-per-node=1", "--cpu-bind=none"]

    def start_options(self) -> list[str]:
        """Options of the srun that starts all ranks, without the names of the nodes.

        When a task ends, the others have a minute to end by themselves and to record the reason; then srun ends them.
        """
        common = [f"--nodes={self.needed}", "--wait=60", "--kill-on-bad-exit=0", "--distribution=block"]
        if self.launch == "torchrun":
            # The task of a node gets all its processors: the ranks bind themselves to those near their GPUs.
            return [*common, f"--ntasks={self.needed}", "--ntasks-per-node=1", "--cpu-bind=none"]
        # Each rank gets its own consecutive processors. It sees all GPUs of its node and uses the one of its local
        # rank: if a task sees only one GPU, NCCL cannot copy between GPUs.
        per_rank = max(1, self.cpus // self.ranks_per_node)
        tasks = [f"--ntasks={self.ranks}", f"--ntasks-per-node={self.ranks_per_node}"]
        return [*common, *tasks, f"--cpus-per-task={per_rank}", "--cpu-bind=cores", "--gpu-bind=none"]


def rendezvous_port(job: int, restarts: int) -> int:
    """The port for the rendezvous of a job's ranks; the port after it is for the rendezvous of the node check.

    Both follow from the job's id, so that jobs on the same node use different ports, and are below Linux's ephemeral
    ports. If one of the pair is in use on this node, the next pair is tried.

    Args:
        job: SLURM's id of the job.
        restarts: how often it was restarted; each start has another pair, since a process of the last start may still
            be ending.
    """
    for number in count(job * _PAIRS_PER_JOB + restarts % _PAIRS_PER_JOB):
        port = _FIRST_PORT + 2 * (number % _PAIRS)
        if number - job * _PAIRS_PER_JOB > _MAX_TRIES or (_is_free(port) and _is_free(port + 1)):
            return port
    raise AssertionError("count() does not end")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
