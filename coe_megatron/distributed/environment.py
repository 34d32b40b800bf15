"""Reads and checks the environment variables that launchers (torchrun, srun, our own) set for a process. Without torch.

Every variable that is set is checked, so a mistake is reported in one line that names it, and no rank waits for another
that cannot start. No other code reads these variables.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from coe_megatron.errors import ConfigError
from coe_megatron.text import shortened

MOST_RANKS = 1 << 20
LARGEST_PORT = 65_535
RENDEZVOUS_TIMEOUT, LAUNCHER_RENDEZVOUS_TIMEOUT = 60, 600  # seconds that ranks wait for each other at the start
_MAX_RENDEZVOUS_TIMEOUT = 86_400
_MOST_THREADS = 65_536
_COUNTS = {  # smallest and largest valid value by variable
    "RANK": (0, MOST_RANKS - 1),
    "WORLD_SIZE": (1, MOST_RANKS),
    "LOCAL_RANK": (0, MOST_RANKS - 1),
    "LOCAL_WORLD_SIZE": (1, MOST_RANKS),
    "GROUP_RANK": (0, MOST_RANKS - 1),
    "GROUP_WORLD_SIZE": (1, MOST_RANKS),
    "MASTER_PORT": (1, LARGEST_PORT),
    "TORCHELASTIC_RESTART_COUNT": (0, MOST_RANKS),
    "COE_RENDEZVOUS_TIMEOUT": (1, _MAX_RENDEZVOUS_TIMEOUT),
}
_BELOW = (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("GROUP_RANK", "GROUP_WORLD_SIZE"))
_SINGLE = {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1}  # of a single process
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_LOOPBACK = re.compile(r"localhost$|127\.|::1$")
_DEVICE = re.compile(r"-1|[0-9]{1,4}|(GPU|MIG)-[0-9A-Za-z/-]{1,80}|NoDevFiles", re.ASCII)  # the last one is SLURM's
_SHOWN = 50  # characters of a value in a message


@dataclass(frozen=True)
class DistributedEnv:
    """Rank, world size and node of this process; the default is a single process.

    Attributes:
        store_prefix: separates the keys of this attempt from those of earlier ones in the same rendezvous store; empty
            if each attempt has a new store.
        node_rank: index of this process's node, from 0.
        log_dir: folder in which the launcher keeps this rank's logs; None if it keeps none.
        master_addr, master_port: address of the rendezvous store; empty and 0 for a single process.
        agent_store: whether torchrun's agent hosts the rendezvous store; otherwise rank 0 does.
        single_node: whether all ranks are on this host.
        launched: whether a launcher set these variables, rather than the user by hand.
        rendezvous_timeout: seconds that ranks wait for each other at the start.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    store_prefix: str = ""
    node_rank: int = 0
    log_dir: Path | None = None
    master_addr: str = ""
    master_port: int = 0
    agent_store: bool = False
    single_node: bool = True
    launched: bool = False
    rendezvous_timeout: int = RENDEZVOUS_TIMEOUT

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "DistributedEnv":
        """Read what torchrun set (RANK, WORLD_SIZE, ...); without RANK, this is a single process.

        When torchrun 2.13 restarts ranks (`--max-restarts`), its store still holds the addresses of the ranks before
        them, and the new ones connect to processes that are gone. On a single node the restart count keeps the keys of
        each attempt separate; on several nodes the counts differ, so start torchrun with
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.

        Raises:
            ConfigError: a variable is invalid, contradicts another one, or needs one that is not set.
        """
        _check_threads(environment)
        _check_devices(environment)
        counts = _counts(environment)
        agent_store = _agent_store(environment)
        launched = "TORCHELASTIC_RUN_ID" in environment or "COE_ATTEMPT" in environment
        default = LAUNCHER_RENDEZVOUS_TIMEOUT if launched else RENDEZVOUS_TIMEOUT
        timeout = counts.get("COE_RENDEZVOUS_TIMEOUT", default)
        if "RANK" not in counts:
            return cls(rendezvous_timeout=timeout)
        world_size = counts["WORLD_SIZE"]
        address, port = _store_address(environment, counts) if world_size > 1 else ("", 0)
        restarts = counts.get("TORCHELASTIC_RESTART_COUNT", 0)
        return cls(
            rank=counts["RANK"],
            world_size=world_size,
            local_rank=counts.get("LOCAL_RANK", 0),
            store_prefix=f"start {restarts}" if agent_store and counts.get("GROUP_WORLD_SIZE") == 1 else "",
            node_rank=counts.get("GROUP_RANK", 0),
            log_dir=_log_dir(environment),
            master_addr=address,
            master_port=port,
            agent_store=agent_store,
            single_node=world_size == counts.get("LOCAL_WORLD_SIZE", 1) or bool(_LOOPBACK.match(address)),
            launched=launched,
            rendezvous_timeout=timeout,
        )


def rank_of(environment: Mapping[str, str]) -> int:
    """The rank of this process; 0 if the environment has none or an invalid one."""
    try:
        rank, size = (whole_number(name, environment.get(name, ""), *_COUNTS[name]) for name in ("RANK", "WORLD_SIZE"))
    except ConfigError:
        return 0
    return rank if rank < size else 0


def whole_number(name: str, text: str, least: int, most: int) -> int:
    """Parse the value of a variable or option.

    Raises:
        ConfigError: it is not made of ASCII digits alone, or outside these bounds.
    """
    value = int(text) if re.fullmatch(r"[0-9]{1,12}", text) else -1
    if not least <= value <= most:
        raise ConfigError(f"{name} is {_shown(text)}: it must be a whole number from {least} to {most}")
    return value


def _counts(environment: Mapping[str, str]) -> dict[str, int]:
    """The variables of `_COUNTS` that are set, checked against each other."""
    counts = {
        name: whole_number(name, environment[name], *bounds) for name, bounds in _COUNTS.items() if name in environment
    }
    for name, needed in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK"), *((name, "RANK") for name in _SINGLE)):
        if name in counts and needed not in counts and counts[name] != _SINGLE.get(name):
            raise ConfigError(
                f"{name} is {counts[name]}, but {needed} is not set: set both RANK and WORLD_SIZE, or neither"
            )
    for name, size in _BELOW:
        if name in counts and size in counts and counts[name] >= counts[size]:
            raise ConfigError(f"{name} is {counts[name]}: it must be below {size}, which is {counts[size]}")
    _check_nodes(counts)
    return counts


def _check_nodes(counts: Mapping[str, int]) -> None:
    """Check that each node has the same number of ranks."""
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


def _store_address(environment: Mapping[str, str], counts: Mapping[str, int]) -> tuple[str, int]:
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


def _log_dir(environment: Mapping[str, str]) -> Path | None:
    name = "TORCHELASTIC_ERROR_FILE"
    try:
        return Path(environment[name]).resolve().parent if environment.get(name) else None
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or an invalid file name
        raise ConfigError(f"{name} is {_shown(environment[name])}: it must be the path of a file ({error})") from None


def _agent_store(environment: Mapping[str, str]) -> bool:
    text = environment.get("TORCHELASTIC_USE_AGENT_STORE", "False")
    if text not in ("True", "False"):
        raise ConfigError(f"TORCHELASTIC_USE_AGENT_STORE is {_shown(text)}: it must be True or False")
    return text == "True"


def _check_threads(environment: Mapping[str, str]) -> None:
    for name in _THREADS:
        text = environment.get(name, "1")
        for part in text.split(","):  # OpenMP takes one number per nesting level
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
