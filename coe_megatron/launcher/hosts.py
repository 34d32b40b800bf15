"""The hosts of a run, in order, and the number of ranks on each; from lists and host files in MPI's format."""

import re
from dataclasses import dataclass
from pathlib import Path

from coe_megatron.distributed.environment import MOST_RANKS, whole_number
from coe_megatron.errors import ConfigError
from coe_megatron.files import problem, read_limited

_FILE_BYTES = 1 << 22
_NAME = re.compile(r"([A-Za-z0-9._-]+@)?[A-Za-z0-9][A-Za-z0-9._-]*")  # ssh would take a leading - for an option
MAX_SLOTS = 4096


@dataclass(frozen=True)
class Host:
    """A host as the user names it; `slots` is the largest number of ranks on it, None if not given."""

    name: str
    slots: int | None = None

    @property
    def address(self) -> str:
        """The name for other hosts, without the user name for the remote shell."""
        return self.name.rpartition("@")[2]


def from_list(text: str) -> list[Host]:
    """Parse `a,b:8,user@c`: names, optionally with the number of ranks after a colon.

    Raises:
        ConfigError: one line with the problem and what would be valid.
    """
    hosts = [_from_entry(entry.strip()) for entry in text.split(",")]
    return _distinct(hosts, f"--hosts is {text!r}")


def from_file(path: Path) -> list[Host]:
    """Read a host file: lines `NAME slots=N`, where `slots=N` is optional; `#` starts a comment.

    Raises:
        ConfigError: one line with file and line, the problem and what would be valid.
    """
    hosts = []
    try:
        text = read_limited(path, "--hostfile", _FILE_BYTES).decode()
    except UnicodeDecodeError:
        raise problem(path, "--hostfile", "it is not UTF-8 text") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if words := line.partition("#")[0].split():
            hosts.append(_from_words(words, f"{path}, line {number}"))
    return _distinct(hosts, f"--hostfile is {path}")


def ranks_per_node(hosts: list[Host], requested: int | None) -> int:
    """The number of ranks on each host: `requested`, or else the slots, or else one.

    Raises:
        ConfigError: the hosts have different slots, or fewer than `requested`.
    """
    slots = {host.slots for host in hosts}
    if requested is None and len(slots) > 1:
        given = ", ".join(f"{host.name}={host.slots or 'not given'}" for host in hosts)
        raise ConfigError(
            f"slots differ ({given}): give all hosts the same number, or --ranks-per-node N with at most the smallest"
        )
    count = requested if requested is not None else slots.pop() or 1
    if count * len(hosts) > MOST_RANKS:
        raise ConfigError(f"{count} ranks on each of {len(hosts)} hosts: at most {MOST_RANKS} ranks are possible")
    for host in hosts:
        if host.slots is not None and host.slots < count:
            raise ConfigError(
                f"--ranks-per-node is {count}, but {host.name} has {host.slots} slots: give at most that many"
            )
    return count


def _from_entry(entry: str) -> Host:
    name, colon, slots = entry.partition(":")
    return Host(_name(name, f"{entry!r} in --hosts"), _slots(slots, f"{entry!r} in --hosts") if colon else None)


def _from_words(words: list[str], where: str) -> Host:
    name, slots = _name(words[0], where), None
    for word in words[1:]:
        key, _, value = word.partition("=")
        if key != "slots":
            raise ConfigError(f"{where}: {word!r} is unknown after {name}: only slots=N is valid there")
        slots = _slots(value, where)
    return Host(name, slots)


def _name(text: str, where: str) -> str:
    if text.startswith("-") or not _NAME.fullmatch(text) or len(text) > 253:
        raise ConfigError(f"{where}: {text!r} is not a host name: use letters, digits, '.', '-' and '_'")
    return text


def _slots(text: str, where: str) -> int:
    try:
        return whole_number("slots", text, 1, MAX_SLOTS)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _distinct(hosts: list[Host], where: str) -> list[Host]:
    if not hosts:
        raise ConfigError(f"{where}: it names no host: give at least one")
    seen: set[str] = set()
    for host in hosts:
        if host.address in seen:
            raise ConfigError(f"{where}: {host.address} is given twice: name each host once, with all its slots")
        seen.add(host.address)
    return hosts
