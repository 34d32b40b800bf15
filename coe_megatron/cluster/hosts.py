"""The hosts of a run: which ones, in what order, how many ranks on each. Lists and files as MPI users write them."""

from dataclasses import dataclass
from pathlib import Path


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
        ValueError: one line that says what is wrong and what would be valid.
    """
    hosts = [_from_entry(entry.strip()) for entry in text.split(",")]
    return _distinct(hosts, f"--hosts is {text!r}")


def from_file(path: Path) -> list[Host]:
    """The hosts of a file with a line `NAME slots=N` each (`slots=N` may be left out); `#` begins a comment.

    Raises:
        ValueError: one line that names file and line, what is wrong and what would be valid.
        OSError: the file cannot be read.
    """
    hosts = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if words := line.partition("#")[0].split():
            hosts.append(_from_words(words, f"{path}, line {number}"))
    return _distinct(hosts, f"--hostfile is {path}")


def ranks_per_node(hosts: list[Host], asked: int | None) -> int:
    """How many ranks each host gets: as asked, else by the slots, else one.

    Raises:
        ValueError: the hosts have different slots, or fewer than asked for.
    """
    slots = {host.slots for host in hosts}
    if asked is None and len(slots) > 1:
        said = ", ".join(f"{host.name}={host.slots or 'unsaid'}" for host in hosts)
        raise ValueError(
            f"slots differ ({said}): give each host as many, or --ranks-per-node N for fewer than there are"
        )
    count = asked if asked is not None else slots.pop() or 1
    if count < 1:
        raise ValueError(f"--ranks-per-node is {count}: it must be at least 1")
    for host in hosts:
        if host.slots is not None and host.slots < count:
            raise ValueError(
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
            raise ValueError(f"{where}: {word!r} is unknown after {name}: only slots=N may stand there")
        slots = _slots(value, where)
    return Host(name, slots)


def _name(text: str, where: str) -> str:
    plain = text.replace(".", "").replace("-", "").replace("_", "").replace("@", "")
    if not plain.isalnum() or text.startswith("-"):  # such a name would be an option of the remote shell
        raise ValueError(f"{where}: {text!r} is no name of a host: letters, digits, '.', '-' and '_' make one")
    return text


def _slots(text: str, where: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise ValueError(f"{where}: slots are {text!r}: they must be a number of at least 1")
    return int(text)


def _distinct(hosts: list[Host], where: str) -> list[Host]:
    if not hosts:
        raise ValueError(f"{where}: it names no host: at least one is needed")
    seen: set[str] = set()
    for host in hosts:
        if host.address in seen:
            raise ValueError(f"{where}: {host.address} stands there twice: name each host once, with all its slots")
        seen.add(host.address)
    return hosts
