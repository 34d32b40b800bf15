"""Which interface leads to a host, and ports that two jobs cannot share."""

import socket
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest
from programs import python
from torch.distributed import DistNetworkError, TCPStore

from coe_megatron.launcher.network import (
    address_towards,
    free_port,
    hold_port,
    interface_towards,
    use_interface_towards,
)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_loopback_leads_to_this_machine(host: str) -> None:
    assert socket.AF_INET in {found.family for found in psutil.net_if_addrs()[interface_towards(host)]}
    assert interface_towards(host) == "lo"


def test_the_interface_is_the_one_with_the_address_of_the_route(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = {
        "docker0": [SimpleNamespace(address="172.17.0.1")],
        "ib0": [SimpleNamespace(address=address_towards("127.0.0.1"))],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: made_up)
    assert interface_towards("127.0.0.1") == "ib0"
    made_up.pop("ib0")
    with pytest.raises(ValueError, match=r"host '127.0.0.1': no interface of \S+ has the address 127.0.0.1 "):
        interface_towards("127.0.0.1")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}),
        ({"NCCL_SOCKET_IFNAME": "^docker"}, {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "^docker"}),
        ({"GLOO_SOCKET_IFNAME": "ib0,ib1"}, {"GLOO_SOCKET_IFNAME": "ib0,ib1", "NCCL_SOCKET_IFNAME": "=lo"}),
        ({"NCCL_SOCKET_IFNAME": ""}, {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}),
    ],
)
def test_gloo_and_nccl_get_that_very_interface_unless_the_user_says_another(
    before: dict[str, str], after: dict[str, str]
) -> None:
    use_interface_towards("127.0.0.1", before)
    assert before == after


@pytest.mark.parametrize("host", ["no-such-host.invalid", "..", ""])
def test_a_host_that_is_none_is_one_line(host: str) -> None:
    with pytest.raises(ValueError, match=f"host '{host}' cannot be reached from ") as raised:
        interface_towards(host)
    assert "\n" not in str(raised.value)


def test_a_held_port_is_given_to_nobody_but_can_be_listened_on() -> None:
    with hold_port() as held:
        port = held.getsockname()[1]
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", port))
        store = TCPStore("127.0.0.1", port, 1, is_master=True, timeout=timedelta(seconds=20))
        store.set("key", "value")
        with pytest.raises(DistNetworkError):  # a second job's server there ends, it does not join
            TCPStore("127.0.0.1", port, 1, is_master=True, timeout=timedelta(seconds=20))
        assert store.get("key") == b"value"


def test_held_ports_differ() -> None:
    held = [hold_port() for _ in range(50)]
    assert len({one.getsockname()[1] for one in held} | {free_port()}) == 51
    for one in held:
        one.close()


def test_torch_is_not_imported() -> None:
    assert python("-c", "import sys, coe_megatron.launcher.network; sys.exit('torch' in sys.modules)").returncode == 0
