"""How a job's ranks are started: checked variables, options of srun, the port where ranks meet. Without torch.

The job itself is launch/slurm/pretrain.sbatch, which SLURM's own programs stand in (a container may not have them); it
asks `python -m coe_megatron.cli.slurm_job` for everything else.
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
_FIRST_PORT, _PAIRS = 20_000, 6_000  # below 32768, from where Linux takes ports by itself
_OF_A_JOB = 8  # pairs: its starts one after another get others
_TRIED = 1_000


@dataclass(frozen=True)
class JobPlan:
    """What a job's nodes do.

    Attributes:
        nodes: of the job, spare ones included.
        needed: how many of them the run takes.
        ranks_per_node: a rank for a GPU, unless COE_RANKS_PER_NODE says otherwise.
        launch: `torchrun` (a task a node) or `tasks` (a task a rank).
        check: whether nodes are looked at before.
        cpus: of a node, that are the job's.
    """

    nodes: int
    needed: int
    ranks_per_node: int
    launch: Literal["torchrun", "tasks"]
    check: bool
    cpus: int

    @classmethod
    def from_environment(cls, nodes: Sequence[str], environment: Mapping[str, str]) -> "JobPlan":
        """What SLURM's variables and those of the user (COE_...) ask for, with SLURM's names of the job's nodes.

        Raises:
            ConfigError: one line that names the variable, its value and what would be valid.
        """
        if not nodes:
            said = environment.get("SLURM_JOB_NODELIST", "not set")
            raise ConfigError(f"SLURM_JOB_NODELIST is {said}: scontrol knows no such nodes")
        launch = environment.get("COE_LAUNCH") or "torchrun"
        if launch not in ("torchrun", "tasks"):
            raise ConfigError(f"COE_LAUNCH is {launch}: it must be torchrun (one task a node) or tasks (one a rank)")
        ranks = environment.get("COE_RANKS_PER_NODE") or environment.get("SLURM_GPUS_ON_NODE") or "1"
        if not _COUNT.fullmatch(ranks) or ranks == "0":
            raise ConfigError(f"COE_RANKS_PER_NODE is {ranks}: it must be a number from 1 to 999999")
        check = environment.get("COE_CHECK_NODES") or "1"
        if check not in ("0", "1"):
            raise ConfigError(f"COE_CHECK_NODES is {check}: it must be 0 or 1")
        spare = environment.get("COE_SPARE_NODES") or "0"
        if not _COUNT.fullmatch(spare) or int(spare) >= len(nodes):
            raise ConfigError(f"COE_SPARE_NODES is {spare}: it must be a number below that of the nodes, {len(nodes)}")
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

    def check_options(self) -> list[str]:
        """Of the srun that looks at all nodes; none where that is not asked for."""
        if not self.check:
            return []
        return [f"--nodes={self.nodes}", f"--ntasks={self.nodes}", "--ntasks-per-node=1", "--cpu-bind=none"]

    def start_options(self) -> list[str]:
        """Of the srun that starts all ranks, but for the names of the nodes.

        When a task ends the others have a minute to end by themselves and to write why; then srun ends them.
        """
        common = [f"--nodes={self.needed}", "--wait=60", "--kill-on-bad-exit=0", "--distribution=block"]
        if self.launch == "torchrun":
            # All of a node's processors for the one task: its ranks bind themselves to those near their GPUs.
            return [*common, f"--ntasks={self.needed}", "--ntasks-per-node=1", "--cpu-bind=none"]
        # Each rank its own consecutive processors. It sees all GPUs of its node and takes that of its local rank: where
        # a task sees one GPU alone, NCCL cannot copy from GPU to GPU.
        own = max(1, self.cpus // self.ranks_per_node)
        tasks = [f"--ntasks={self.ranks}", f"--ntasks-per-node={self.ranks_per_node}"]
        return [*common, *tasks, f"--cpus-per-task={own}", "--cpu-bind=cores", "--gpu-bind=none"]


def meeting_port(job: int, restarts: int) -> int:
    """A port where the ranks of a job meet; the next one is the job's too (the node check meets there).

    Both follow from the job's number, so that jobs which share a node have others, and are below those that Linux gives
    to whoever asks for any. A pair of which one is in use on this node is passed over, for the next one.

    Args:
        restarts: of the job; each start has another pair, as a process of the last one may not have ended yet.
    """
    for number in count(job * _OF_A_JOB + restarts % _OF_A_JOB):
        port = _FIRST_PORT + 2 * (number % _PAIRS)
        if number - job * _OF_A_JOB > _TRIED or (_is_free(port) and _is_free(port + 1)):
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
