"""Rendezvous of the ranks before process groups exist: a store hosted by rank 0 or torchrun, with bounded waits.

Ranks on a single node connect to its loopback address, which no other host can reach. Torch's own server listens on all
interfaces, and its client floods stderr while it waits, so this module opens the socket and waits for it itself.
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
_FIRST_POLL, _LAST_POLL = 0.01, 0.25  # seconds; doubled after each poll, to spare the store of many ranks
_DNS_TIMEOUT = 10  # seconds: while a cluster is being set up, a name may be registered late
_ALL_HERE = "all here"
_NAMED = 8  # most missing ranks that a message names


class RendezvousError(Exception):
    """The ranks did not find each other in time; its text is one line that names the address."""


def rendezvous(env: DistributedEnv) -> dist.Store:
    """Wait for all ranks of this attempt and return their common store; a single process gets a local store.

    Several ranks connect to the address that their launcher gives (MASTER_ADDR, MASTER_PORT).

    Raises:
        RendezvousError: rank 0 does not answer, or ranks are missing, after `env.rendezvous_timeout` seconds.
    """
    if env.world_size == 1:
        return dist.HashStore()
    deadline = time.monotonic() + env.rendezvous_timeout
    address = LOOPBACK if env.single_node and not env.agent_store else env.master_addr
    place = f"MASTER_ADDR is {env.master_addr}, MASTER_PORT {env.master_port}"
    with _one_line_errors(place):
        if env.rank == 0 and not env.agent_store:
            store = serve_store(address, env.master_port)
        else:
            store = connect_store(address, env.master_port, env.rendezvous_timeout)
    store = dist.PrefixStore(env.store_prefix, store) if env.store_prefix else store
    try:
        _gather(env, store, deadline)
    except dist.DistError:
        raise RendezvousError(f"{place}: the store there closed before all ranks had connected") from None
    except TimeoutError as error:
        raise RendezvousError(f"{place}: {error} within {env.rendezvous_timeout} s (COE_RENDEZVOUS_TIMEOUT)") from None
    return store


def serve_store(address: str, port: int) -> dist.Store:
    """Host a store: on the loopback interface if that is the address, otherwise on all interfaces.

    Raises:
        OSError: the port cannot be bound.
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


def connect_store(address: str, port: int, seconds: float) -> dist.Store:
    """Connect to a store that another process hosts, or will host within `seconds`.

    Raises:
        OSError: nobody answers in time; for a host name that does not resolve, after ten seconds.
    """
    deadline = time.monotonic() + seconds
    dns_deadline = time.monotonic() + min(seconds, _DNS_TIMEOUT)
    for pause in _pauses():
        left = deadline - time.monotonic()
        try:
            with socket.create_connection((address, port), timeout=max(left, _LAST_POLL)) as probe:
                found = str(probe.getpeername()[0])
            break
        except (OSError, UnicodeError) as error:  # UnicodeError: an invalid name, such as one with an empty label
            unknown = isinstance(error, socket.gaierror | UnicodeError)
            if time.monotonic() > (dns_deadline if unknown else deadline) or isinstance(error, UnicodeError):
                raise OSError(_reason(error, seconds)) from None
            time.sleep(pause)
    return dist.TCPStore(found, port, is_master=False, timeout=default_pg_timeout, wait_for_workers=False)


def _reason(error: OSError | UnicodeError, seconds: float) -> str:
    if isinstance(error, UnicodeError):
        return "it is not a valid host name"
    if isinstance(error, socket.gaierror):
        return f"this host name does not resolve here ({error.strerror})"
    return f"nobody answers there within {seconds:g} s ({error.strerror or error})"


@contextmanager
def _one_line_errors(place: str) -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        raise RendezvousError(
            f"{place}: the process that answers there is not a rendezvous store ({str(error).splitlines()[0]})"
        ) from None
    except OSError as error:
        raise RendezvousError(f"{place}: {error.strerror or error}") from None


def _gather(env: DistributedEnv, store: dist.Store, deadline: float) -> None:
    """Wait for all ranks. Rank 0 counts them; the others wait for its signal.

    This polls because torch's own `wait` prints warnings when the time runs out.
    """
    store.set(f"here/{env.rank}", "")
    if env.rank != 0:
        if not _wait(store, [_ALL_HERE], deadline):
            raise TimeoutError("rank 0 is there, but not all other ranks connected")
        return
    names = [f"here/{rank}" for rank in range(env.world_size)]
    if not _wait(store, names, deadline):
        absent = [rank for rank, name in enumerate(names) if not store.check([name])]
        more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
        named = ", ".join(map(str, absent[:_NAMED]))
        raise TimeoutError(f"WORLD_SIZE is {env.world_size}, but ranks {named}{more} did not connect")
    store.set(_ALL_HERE, "")


def _wait(store: dist.Store, keys: list[str], deadline: float) -> bool:
    for pause in _pauses():
        if store.check(keys):
            break
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def _pauses() -> Iterator[float]:
    pause = _FIRST_POLL
    while True:
        yield pause
        pause = min(2 * pause, _LAST_POLL)
