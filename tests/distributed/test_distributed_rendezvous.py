"""Rendezvous: with all ranks, too few, none, and at an invalid address; nothing listens beyond this host."""

import os
import socket
import threading
import time
from dataclasses import replace

import psutil
import pytest
import torch.distributed as dist

from coe_megatron.distributed import rendezvous as rendezvous_module
from coe_megatron.distributed.environment import DistributedEnv
from coe_megatron.distributed.rendezvous import RendezvousError, connect_store, rendezvous, serve_store
from coe_megatron.launcher.network import free_port

pytestmark = pytest.mark.thorough


@pytest.fixture
def pair() -> DistributedEnv:
    return DistributedEnv(rank=0, world_size=2, master_addr="127.0.0.1", master_port=free_port(), rendezvous_timeout=1)


def listens(port: int) -> set[str]:
    found = psutil.Process(os.getpid()).net_connections("tcp")
    return {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN and one.laddr.port == port}


def test_ranks_on_one_host_use_the_loopback_address(pair: DistributedEnv) -> None:
    """Whatever the host name is: it may resolve to another interface."""
    env = replace(pair, master_addr="no-such-host.invalid", rendezvous_timeout=60)
    found: dict[int, dist.Store] = {}

    def connect(rank: int) -> None:
        found[rank] = rendezvous(replace(env, rank=rank))

    second = threading.Thread(target=connect, args=(1,))
    second.start()  # before rank 0 serves the store
    time.sleep(0.3)
    connect(0)
    second.join()
    assert listens(pair.master_port) == {"127.0.0.1"}
    found[0].set("key", "value")
    assert found[1].get("key") == b"value"


def test_across_hosts_the_store_listens_on_all_interfaces(pair: DistributedEnv) -> None:
    store = serve_store("0.0.0.0", pair.master_port)
    assert listens(pair.master_port) <= {"::", "0.0.0.0"} and listens(pair.master_port)
    store.set("key", "value")
    assert connect_store("localhost", pair.master_port, 10).get("key") == b"value"


def test_a_single_process_does_not_listen() -> None:
    assert isinstance(rendezvous(DistributedEnv()), dist.HashStore)


def refused(env: DistributedEnv, within: float) -> str:
    began = time.monotonic()
    with pytest.raises(RendezvousError) as raised:
        rendezvous(env)
    assert time.monotonic() - began < within
    assert str(raised.value).startswith(f"MASTER_ADDR is {env.master_addr}, MASTER_PORT {env.master_port}: ")
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_the_wait_for_rank_0_ends_after_the_timeout(pair: DistributedEnv, capfd: pytest.CaptureFixture) -> None:
    assert "nobody answers there within 1 s (Connection refused)" in refused(replace(pair, rank=1), 10)
    assert capfd.readouterr().err == ""  # torch's own client would write to it


def test_rank_0_names_the_missing_ranks(pair: DistributedEnv, capfd: pytest.CaptureFixture) -> None:
    said = refused(replace(pair, world_size=12), 10)
    assert "but ranks 1, 2, 3, 4, 5, 6, 7, 8 and 3 more did not connect within 1 s (COE_RENDEZVOUS_TIMEOUT)" in said
    assert capfd.readouterr().err == ""


def test_a_rank_that_waits_for_a_third_one_times_out_too(pair: DistributedEnv) -> None:
    first = threading.Thread(
        target=lambda: refused(replace(pair, world_size=3, rendezvous_timeout=60), 90), daemon=True
    )
    first.start()
    assert "rank 0 is there, but not all other ranks connected" in refused(replace(pair, rank=1, world_size=3), 20)


@pytest.mark.parametrize("address", ["no-such-host.invalid", "a..b"])
def test_an_unknown_host_name_fails_before_the_timeout(
    address: str, pair: DistributedEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous_module, "_DNS_TIMEOUT", 0.3)
    said = refused(replace(pair, rank=1, master_addr=address, single_node=False, rendezvous_timeout=600), 30)
    assert "this host name does not resolve here" in said or "not a valid host name" in said


def test_a_port_in_use_is_reported(pair: DistributedEnv) -> None:
    with socket.create_server(("127.0.0.1", pair.master_port)):
        assert ": Address already in use" in refused(pair, 10)
