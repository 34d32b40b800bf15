"""Addresses, interfaces and ports of this host, for launchers. Without torch."""

import socket
from collections.abc import MutableMapping

import psutil

from coe_megatron.errors import ConfigError

_ANY_PORT = 9  # connecting a UDP socket sends nothing, it only looks up the route


def address_towards(host: str) -> str:
    """The source address of packets from this host to `host`, a name or an address.

    Raises:
        ConfigError: the name does not resolve here, or there is no route.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except (OSError, UnicodeError) as error:  # UnicodeError: an invalid name, such as one with an empty label
        raise ConfigError(f"host {host!r} cannot be reached from {socket.gethostname()}: {error}") from error


def interface_towards(host: str) -> str:
    """The network interface for packets from this host to `host`, such as `eth0` or `ib0`.

    By default gloo and NCCL choose one themselves, possibly without a connection to other hosts (a container bridge).

    Raises:
        ConfigError: the name does not resolve here, there is no route, or no interface has the route's address.
    """
    address = address_towards(host)
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == address for found in addresses):
            return name
    raise ConfigError(f"host {host!r}: no interface of {socket.gethostname()} has the address {address} of its route")


def use_interface_towards(host: str, environment: MutableMapping[str, str]) -> None:
    """Make gloo and NCCL use the interface of the route to `host`, unless the environment already sets one.

    Raises:
        ConfigError: as in `interface_towards`.
    """
    interface = interface_towards(host)
    # NCCL matches names by prefix unless `=` is in front; gloo takes the exact name.
    for name, value in (("GLOO_SOCKET_IFNAME", interface), ("NCCL_SOCKET_IFNAME", f"={interface}")):
        environment[name] = environment.get(name) or value


def hold_port() -> socket.socket:
    """Reserve a free port on all interfaces for as long as the returned socket is open.

    The socket is bound but does not listen. A server with SO_REUSEADDR, such as torch's TCPStore, can listen on the
    port in the meantime, while the kernel gives it to no other process that asks for any free port.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("", 0))
    return holder


def free_port() -> int:
    """A port that is free at this moment; if other processes choose ports too, use `hold_port`."""
    with hold_port() as holder:
        return int(holder.getsockname()[1])
