"""Addresses, interfaces and ports of this host, as a launcher needs them. Without torch."""

import socket
from collections.abc import MutableMapping

import psutil

from coe_megatron.errors import ConfigError

_ANY_PORT = 9  # nothing is sent: connecting a UDP socket only asks the kernel for the route


def address_towards(host: str) -> str:
    """The address of this machine that packets to `host` (a name or an address) carry.

    Raises:
        ConfigError: the name is not known here, or no route leads to it.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except (OSError, UnicodeError) as error:  # UnicodeError: no name at all, such as one with an empty part
        raise ConfigError(f"host {host!r} cannot be reached from {socket.gethostname()}: {error}") from error


def interface_towards(host: str) -> str:
    """The network interface through which packets to `host` leave this machine, such as `eth0` or `ib0`.

    Gloo and NCCL would otherwise choose by themselves, and may take one that leads nowhere (a bridge of containers).

    Raises:
        ConfigError: the name is not known here, no route leads to it, or no interface has the route's address.
    """
    address = address_towards(host)
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == address for found in addresses):
            return name
    raise ConfigError(f"host {host!r}: no interface of {socket.gethostname()} has the address {address} of its route")


def use_interface_towards(host: str, environment: MutableMapping[str, str]) -> None:
    """Have gloo and NCCL talk through the interface that leads to `host`; what is set in the environment wins.

    Raises:
        ConfigError: as `interface_towards` does.
    """
    interface = interface_towards(host)
    # NCCL takes a name for the beginning of names, unless it stands behind `=`; gloo takes it as it is.
    for name, value in (("GLOO_SOCKET_IFNAME", interface), ("NCCL_SOCKET_IFNAME", f"={interface}")):
        environment[name] = environment.get(name) or value


def hold_port() -> socket.socket:
    """A port on all interfaces that the kernel gives to nobody else for as long as the returned socket is open.

    It is bound but does not listen, so a server that allows its address to be used again (torch's TCPStore does) can
    listen there meanwhile; whoever asks the kernel for any free port, another job too, gets another one.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("", 0))
    return holder


def free_port() -> int:
    """A port that is free at this moment; where others choose ports too, `hold_port` is the safe way."""
    with hold_port() as holder:
        return int(holder.getsockname()[1])
