"""Where ranks meet before they are groups: a store that rank 0 or torchrun serves, and waits that have an end.

Ranks on one host meet at its loopback address, which no other host can reach. Torch's own server listens on all
interfaces, and its client fills stderr while it waits; so the socket, and the waiting for it, are ours.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from coe_megatron.distributed.environment import DistributedEnv

LOOPBACK = "127.0.0.1"
_BACKLOG = 4096
_LOOKS_EVERY = 0.2  # seconds
_NAME_KNOWN_WITHIN = 10  # seconds: in a cluster that is being set up a name may come late
_ALL_HERE = "all here"
_NAMED = 8  # missing ranks that a message names


class NotMet(Exception):
    """Ranks have not come together in time; its text is one line that names the place."""


def meet(ranks: DistributedEnv) -> dist.Store:
    """What the ranks of one attempt have in common before they are groups; a rank on its own needs no place for it.

    Several ranks meet where their launcher tells them to (MASTER_ADDR, MASTER_PORT), and wait for each other there.

    Raises:
        NotMet: rank 0 does not answer, or others have not come, within `ranks.patience` seconds.
    """
    if ranks.world_size == 1:
        return dist.HashStore()
    deadline = time.monotonic() + ranks.patience
    address = LOOPBACK if ranks.one_host and not ranks.served else ranks.address
    place = f"MASTER_ADDR is {ranks.address}, MASTER_PORT {ranks.port}"
    with _told(place):
        if ranks.rank == 0 and not ranks.served:
            store = serve(address, ranks.port)
        else:
            store = join(address, ranks.port, ranks.patience)
    store = dist.PrefixStore(ranks.meeting, store) if ranks.meeting else store
    try:
        _gather(ranks, store, deadline)
    except dist.DistError:
        raise NotMet(f"{place}: whoever listened there has gone before all ranks had come") from None
    except TimeoutError as error:
        raise NotMet(f"{place}: {error} within {ranks.patience} s (COE_MEET_SECONDS)") from None
    return store


def serve(address: str, port: int) -> dist.Store:
    """A store for others, on the loopback interface if that is the address, else on all interfaces.

    Raises:
        OSError: the port cannot be had.
    """
    if address == LOOPBACK:
        listener = socket.create_server((LOOPBACK, port), backlog=_BACKLOG)
    else:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        listener = socket.create_server(("", port), family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    return dist.TCPStore(
        LOOPBACK,
        port,
        is_master=True,
        timeout=default_pg_timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def join(address: str, port: int, seconds: float) -> dist.Store:
    """The store that somebody serves, or will serve in time.

    Raises:
        OSError: nobody does; a name that nobody knows, after ten seconds.
    """
    end = time.monotonic() + seconds
    known_by = time.monotonic() + min(seconds, _NAME_KNOWN_WITHIN)
    while True:
        left = end - time.monotonic()
        try:
            with socket.create_connection((address, port), timeout=max(left, _LOOKS_EVERY)) as probe:
                found = str(probe.getpeername()[0])
            break
        except (OSError, UnicodeError) as error:  # UnicodeError: no name at all, such as one with an empty part
            unknown = isinstance(error, socket.gaierror | UnicodeError)
            if time.monotonic() > (known_by if unknown else end) or isinstance(error, UnicodeError):
                raise OSError(_why(error, seconds)) from None
            time.sleep(_LOOKS_EVERY)
    return dist.TCPStore(found, port, is_master=False, timeout=default_pg_timeout, wait_for_workers=False)


def _why(error: OSError | UnicodeError, seconds: float) -> str:
    if isinstance(error, UnicodeError):
        return "it is no name of a host"
    if isinstance(error, socket.gaierror):
        return f"no host of this name is known here ({error.strerror})"
    return f"nobody answers there within {seconds:g} s ({error.strerror or error})"


@contextmanager
def _told(place: str) -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        raise NotMet(f"{place}: what answers there is no store of ranks ({str(error).splitlines()[0]})") from None
    except OSError as error:
        raise NotMet(f"{place}: {error.strerror or error}") from None


def _gather(ranks: DistributedEnv, store: dist.Store, deadline: float) -> None:
    """Wait until all are here. Rank 0 counts them; the others wait for its word.

    Asking again and again is what torch's own waiting does not replace: that one writes warnings when time runs out.
    """
    store.set(f"here/{ranks.rank}", "")
    if ranks.rank != 0:
        if not _wait(store, [_ALL_HERE], deadline):
            raise TimeoutError("rank 0 is there, but not all other ranks came")
        return
    names = [f"here/{rank}" for rank in range(ranks.world_size)]
    if not _wait(store, names, deadline):
        absent = [rank for rank, name in enumerate(names) if not store.check([name])]
        more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
        named = ", ".join(map(str, absent[:_NAMED]))
        raise TimeoutError(f"WORLD_SIZE is {ranks.world_size}, but of these ranks {named}{more} did not come")
    store.set(_ALL_HERE, "")


def _wait(store: dist.Store, keys: list[str], deadline: float) -> bool:
    while not store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOKS_EVERY)
    return True
