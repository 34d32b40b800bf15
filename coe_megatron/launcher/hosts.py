"""The hosts of a run: which ones, in what order, how many ranks on each. Lists and files as MPI users write them."""

import re
from dataclasses import dataclass
from pathlib import Path

from coe_megatron.distributed.environment import MOST_RANKS, whole_number
from coe_megatron.errors import ConfigError
from coe_megatron.files import problem, read_limited

_FILE_BYTES = 1 << 22
_NAME = re.compile(r"([A-Za-z0-9._-]+@)?[A-Za-z0-9][A-Za-z0-9._-]*")  # beginning with - it would be an option of ssh
MOST_SLOTS = 4096


@dataclass(frozen=True)
class Host:
    """A machine as the user names it; `slots` is how many ranks it has room for, None if that was not said."""

    name: str
    slots: int | None = None

    @property
    def address(self) -> str:
        """The name that other hosts reach it by: without the user that a remote shell may want."""
        return self.name.rpartition("@")[2]


def from_list(text: str) -> list[Host]:
    """The hosts of `a,b:8,user@c`: names with the number of ranks after a colon where it is given.

    Raises:
        ConfigError: one line that says what is wrong and what would be valid.
    """
    hosts = [_from_entry(entry.strip()) for entry in text.split(",")]
    return _distinct(hosts, f"--hosts is {text!r}")


def from_file(path: Path) -> list[Host]:
    """The hosts of a file with a line `NAME slots=N` each (`slots=N` may be left out); `#` begins a comment.

    Raises:
        ConfigError: one line that names file and line, what is wrong and what would be valid.
    """
    hosts = []
    try:
        text = read_limited(path, "--hostfile", _FILE_BYTES).decode()
    except UnicodeDecodeError:
        raise problem(path, "--hostfile", "it is no text in UTF-8") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if words := line.partition("#")[0].split():
            hosts.append(_from_words(words, f"{path}, line {number}"))
    return _distinct(hosts, f"--hostfile is {path}")


def ranks_per_node(hosts: list[Host], asked: int | None) -> int:
    """How many ranks each host gets: as asked, else by the slots, else one.

    Raises:
        ConfigError: the hosts have different slots, or fewer than asked for.
    """
    slots = {host.slots for host in hosts}
    if asked is None and len(slots) > 1:
        said = ", ".join(f"{host.name}={host.slots or 'unsaid'}" for host in hosts)
        raise ConfigError(
            f"slots differ ({said}): give each host as many, or --ranks-per-node N for fewer than there are"
        )
    count = asked if asked is not None else slots.pop() or 1
    if count * len(hosts) > MOST_RANKS:
        raise ConfigError(f"{count} ranks on each of {len(hosts)} hosts: there may be {MOST_RANKS} ranks")
    for host in hosts:
        if host.slots is not None and host.slots < count:
            raise ConfigError(
                f"--ranks-per-node is {count}, but {host.name} has {host.slots} slots: give at most as many"
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
            raise ConfigError(f"{where}: {word!r} is unknown after {name}: only slots=N may stand there")
        slots = _slots(value, where)
    return Host(name, slots)


def _name(text: str, where: str) -> str:
    if text.startswith("-") or not _NAME.fullmatch(text) or len(text) > 253:
        raise ConfigError(f"{where}: {text!r} is no name of a host: letters, digits, '.', '-' and '_' make one")
    return text


def _slots(text: str, where: str) -> int:
    try:
        return whole_number("slots", text, 1, MOST_SLOTS)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _distinct(hosts: list[Host], where: str) -> list[Host]:
    if not hosts:
        raise ConfigError(f"{where}: it names no host: at least one is needed")
    seen: set[str] = set()
    for host in hosts:
        if host.address in seen:
            raise ConfigError(f"{where}: {host.address} stands there twice: name each host once, with all its slots")
        seen.add(host.address)
    return hosts
