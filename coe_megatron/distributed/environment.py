"""What launchers (torchrun, srun, our own) tell a process in its environment, checked as a whole. Without torch.

Every variable that is set is looked at, so that a mistake is one line that names it and nothing waits for a rank that
cannot come. Nothing else reads these variables.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from coe_megatron.errors import ConfigError
from coe_megatron.text import shortened

MOST_RANKS = 1 << 20
LARGEST_PORT = 65_535
PATIENCE, PATIENCE_WITH_LAUNCHER = 60, 600  # seconds that ranks wait for each other at the start
_LONGEST_PATIENCE = 86_400
_MOST_THREADS = 65_536
_COUNTS = {  # by name, the least and the largest value
    "RANK": (0, MOST_RANKS - 1),
    "WORLD_SIZE": (1, MOST_RANKS),
    "LOCAL_RANK": (0, MOST_RANKS - 1),
    "LOCAL_WORLD_SIZE": (1, MOST_RANKS),
    "GROUP_RANK": (0, MOST_RANKS - 1),
    "GROUP_WORLD_SIZE": (1, MOST_RANKS),
    "MASTER_PORT": (1, LARGEST_PORT),
    "TORCHELASTIC_RESTART_COUNT": (0, MOST_RANKS),
    "COE_MEET_SECONDS": (1, _LONGEST_PATIENCE),
}
_BELOW = (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("GROUP_RANK", "GROUP_WORLD_SIZE"))
_ALONE = {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1}  # of one process
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_LOOPBACK = re.compile(r"localhost$|127\.|::1$")
_DEVICE = re.compile(r"-1|[0-9]{1,4}|(GPU|MIG)-[0-9A-Za-z/-]{1,80}|NoDevFiles", re.ASCII)  # the last one is SLURM's
_SHOWN = 50  # characters of a value in a message


@dataclass(frozen=True)
class DistributedEnv:
    """Which process of how many this is; the default is a process on its own.

    Attributes:
        meeting: a name that ranks started by the same attempt have in common; empty where the place they meet at is
            new with every attempt anyway.
        node: on which node this process is, counted from 0.
        logs: the folder where whoever started it keeps this rank's logs, if it does.
        address, port: where the ranks meet; empty and 0 for a process on its own.
        served: whether torchrun serves the store they meet at; else rank 0 does.
        one_host: whether all ranks are on this host.
        launched: whether a launcher has made these variables, and no hand.
        patience: seconds that ranks wait for each other at the start.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    meeting: str = ""
    node: int = 0
    logs: Path | None = None
    address: str = ""
    port: int = 0
    served: bool = False
    one_host: bool = True
    launched: bool = False
    patience: int = PATIENCE

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "DistributedEnv":
        """What torchrun wrote into the environment (RANK, WORLD_SIZE, ...); without RANK a single process.

        When torchrun 2.13 starts ranks anew (`--max-restarts`), they find in its store where those before them
        listened, and connect to nobody. On one node the count of restarts tells them apart; on several nodes the
        counts differ, and torchrun has to be started with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.

        Raises:
            ConfigError: a variable is nonsense, contradicts another one, or needs one that is not set.
        """
        _check_threads(environment)
        _check_devices(environment)
        counts = _counts(environment)
        served = _served(environment)
        launched = "TORCHELASTIC_RUN_ID" in environment or "COE_ATTEMPT" in environment
        patience = counts.get("COE_MEET_SECONDS", PATIENCE_WITH_LAUNCHER if launched else PATIENCE)
        if "RANK" not in counts:
            return cls(patience=patience)
        world_size = counts["WORLD_SIZE"]
        address, port = _meeting_place(environment, counts) if world_size > 1 else ("", 0)
        restarts = counts.get("TORCHELASTIC_RESTART_COUNT", 0)
        return cls(
            rank=counts["RANK"],
            world_size=world_size,
            local_rank=counts.get("LOCAL_RANK", 0),
            meeting=f"start {restarts}" if served and counts.get("GROUP_WORLD_SIZE") == 1 else "",
            node=counts.get("GROUP_RANK", 0),
            logs=_logs(environment),
            address=address,
            port=port,
            served=served,
            one_host=world_size == counts.get("LOCAL_WORLD_SIZE", 1) or bool(_LOOPBACK.match(address)),
            launched=launched,
            patience=patience,
        )


def rank_of(environment: Mapping[str, str]) -> int:
    """The rank of this process, 0 where the environment does not say it or says nonsense."""
    try:
        rank, size = (whole_number(name, environment.get(name, ""), *_COUNTS[name]) for name in ("RANK", "WORLD_SIZE"))
    except ConfigError:
        return 0
    return rank if rank < size else 0


def whole_number(name: str, text: str, least: int, most: int) -> int:
    """The number that a variable or option has for its value.

    Raises:
        ConfigError: it is anything but ASCII digits, or beyond these bounds.
    """
    value = int(text) if re.fullmatch(r"[0-9]{1,12}", text) else -1
    if not least <= value <= most:
        raise ConfigError(f"{name} is {_shown(text)}: it must be a whole number from {least} to {most}")
    return value


def _counts(environment: Mapping[str, str]) -> dict[str, int]:
    """Those of `_COUNTS` that are set, of which none contradicts another."""
    counts = {
        name: whole_number(name, environment[name], *bounds) for name, bounds in _COUNTS.items() if name in environment
    }
    for name, needed in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK"), *((name, "RANK") for name in _ALONE)):
        if name in counts and needed not in counts and counts[name] != _ALONE.get(name):
            raise ConfigError(
                f"{name} is {counts[name]}, but {needed} is not set: set both RANK and WORLD_SIZE, or neither"
            )
    for name, size in _BELOW:
        if name in counts and size in counts and counts[name] >= counts[size]:
            raise ConfigError(f"{name} is {counts[name]}: it must be below {size}, which is {counts[size]}")
    _check_nodes(counts)
    return counts


def _check_nodes(counts: Mapping[str, int]) -> None:
    """That each node has as many ranks."""
    world, local = counts.get("WORLD_SIZE"), counts.get("LOCAL_WORLD_SIZE")
    if world is None or local is None:
        return
    if world % local:
        raise ConfigError(f"LOCAL_WORLD_SIZE is {local}: it must divide WORLD_SIZE, which is {world}")
    nodes = counts.get("GROUP_WORLD_SIZE", world // local)
    if nodes != world // local:
        raise ConfigError(
            f"GROUP_WORLD_SIZE is {nodes}: it must be WORLD_SIZE / LOCAL_WORLD_SIZE, which is {world // local}"
        )
    if counts.get("GROUP_RANK", 0) >= nodes:
        raise ConfigError(f"GROUP_RANK is {counts['GROUP_RANK']}: it must be below the number of nodes, {nodes}")
    if "LOCAL_RANK" in counts and counts["LOCAL_RANK"] > counts["RANK"]:
        raise ConfigError(f"LOCAL_RANK is {counts['LOCAL_RANK']}: it must be at most RANK, which is {counts['RANK']}")


def _meeting_place(environment: Mapping[str, str], counts: Mapping[str, int]) -> tuple[str, int]:
    address = environment.get("MASTER_ADDR")
    for name, missing in (("MASTER_ADDR", address is None), ("MASTER_PORT", "MASTER_PORT" not in counts)):
        if missing:
            raise ConfigError(
                f"{name} is not set, but WORLD_SIZE is {counts['WORLD_SIZE']}: set it to where rank 0 listens"
            )
    assert address is not None
    if not re.fullmatch(r"[^\s\x00-\x1f\x7f]{1,253}", address):
        raise ConfigError(f"MASTER_ADDR is {_shown(address)}: it must be the name or the address of rank 0's host")
    return address, counts["MASTER_PORT"]


def _logs(environment: Mapping[str, str]) -> Path | None:
    name = "TORCHELASTIC_ERROR_FILE"
    try:
        return Path(environment[name]).resolve().parent if environment.get(name) else None
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; what no file can be named
        raise ConfigError(f"{name} is {_shown(environment[name])}: it must be the path of a file ({error})") from None


def _served(environment: Mapping[str, str]) -> bool:
    text = environment.get("TORCHELASTIC_USE_AGENT_STORE", "False")
    if text not in ("True", "False"):
        raise ConfigError(f"TORCHELASTIC_USE_AGENT_STORE is {_shown(text)}: it must be True or False")
    return text == "True"


def _check_threads(environment: Mapping[str, str]) -> None:
    for name in _THREADS:
        text = environment.get(name, "1")
        for part in text.split(","):  # OpenMP takes a number for each level of nesting
            try:
                whole_number(name, part, 1, _MOST_THREADS)
            except ConfigError:
                raise ConfigError(f"{name} is {_shown(text)}: it must be a number of threads, such as 8") from None


def _check_devices(environment: Mapping[str, str]) -> None:
    text = environment.get("CUDA_VISIBLE_DEVICES", "")
    devices = [device.strip(" ") for device in text.split(",")] if text else []
    if not all(_DEVICE.fullmatch(device) for device in devices) or len(set(devices)) < len(devices):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES is {_shown(text)}: it must list devices by number or UUID, each once, such as 0,1"
        )


def _shown(text: str) -> str:
    return repr(shortened(text, _SHOWN))
