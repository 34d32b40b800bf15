"""Ranks that meet: all of them, too few, nobody, and at a place that is none; nothing listens beyond this host."""

import os
import socket
import threading
import time
from dataclasses import replace

import psutil
import pytest
import torch.distributed as dist

from coe_megatron.distributed import rendezvous
from coe_megatron.distributed.environment import DistributedEnv
from coe_megatron.distributed.rendezvous import NotMet, join, meet, serve
from coe_megatron.launcher.network import free_port


@pytest.fixture
def pair() -> DistributedEnv:
    return DistributedEnv(rank=0, world_size=2, address="127.0.0.1", port=free_port(), one_host=True, patience=1)


def listens(port: int) -> set[str]:
    found = psutil.Process(os.getpid()).net_connections("tcp")
    return {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN and one.laddr.port == port}


def test_ranks_on_one_host_meet_at_the_loopback_address(pair: DistributedEnv) -> None:
    """Whatever name the host has, which may be that of an interface."""
    ranks = replace(pair, address="no-such-host.invalid", patience=60)
    found: dict[int, dist.Store] = {}

    def come(rank: int) -> None:
        found[rank] = meet(replace(ranks, rank=rank))

    second = threading.Thread(target=come, args=(1,))
    second.start()  # before there is anybody to meet
    time.sleep(0.3)
    come(0)
    second.join()
    assert listens(pair.port) == {"127.0.0.1"}
    found[0].set("key", "value")
    assert found[1].get("key") == b"value"


def test_across_hosts_the_store_listens_on_all_interfaces(pair: DistributedEnv) -> None:
    store = serve("0.0.0.0", pair.port)
    assert listens(pair.port) <= {"::", "0.0.0.0"} and listens(pair.port)
    store.set("key", "value")
    assert join("localhost", pair.port, 10).get("key") == b"value"


def test_a_rank_on_its_own_listens_nowhere() -> None:
    assert isinstance(meet(DistributedEnv()), dist.HashStore)


def refused(ranks: DistributedEnv, within: float) -> str:
    began = time.monotonic()
    with pytest.raises(NotMet) as raised:
        meet(ranks)
    assert time.monotonic() - began < within
    assert str(raised.value).startswith(f"MASTER_ADDR is {ranks.address}, MASTER_PORT {ranks.port}: ")
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_rank_0_that_never_comes_is_waited_for_as_long_as_said(
    pair: DistributedEnv, capfd: pytest.CaptureFixture
) -> None:
    assert "nobody answers there within 1 s (Connection refused)" in refused(replace(pair, rank=1), 10)
    assert capfd.readouterr().err == ""  # torch's own client would fill it


def test_rank_0_names_those_that_have_not_come(pair: DistributedEnv, capfd: pytest.CaptureFixture) -> None:
    said = refused(replace(pair, world_size=12), 10)
    assert "of these ranks 1, 2, 3, 4, 5, 6, 7, 8 and 3 more did not come within 1 s (COE_MEET_SECONDS)" in said
    assert capfd.readouterr().err == ""


def test_a_rank_that_waits_for_a_third_ends_as_well(pair: DistributedEnv) -> None:
    first = threading.Thread(target=lambda: refused(replace(pair, world_size=3, patience=60), 90), daemon=True)
    first.start()
    assert "rank 0 is there, but not all other ranks came" in refused(replace(pair, rank=1, world_size=3), 20)


@pytest.mark.parametrize("address", ["no-such-host.invalid", "a..b"])
def test_a_name_that_nobody_knows_is_no_matter_of_patience(
    address: str, pair: DistributedEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "_NAME_KNOWN_WITHIN", 0.3)
    said = refused(replace(pair, rank=1, address=address, one_host=False, patience=600), 30)
    assert "no host of this name is known here" in said or "no name of a host" in said


def test_a_port_that_is_taken_is_said(pair: DistributedEnv) -> None:
    with socket.create_server(("127.0.0.1", pair.port)):
        assert ": Address already in use" in refused(pair, 10)
