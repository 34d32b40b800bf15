"""Which CPUs a rank is bound to: those local to its GPU, if it has any of them."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from coe_megatron.distributed import affinity
from coe_megatron.distributed.affinity import local_cpus, set_cpu_affinity


@pytest.mark.parametrize(
    ("text", "near"), [("0-2,8,10-11\n", {0, 1, 2, 8, 10, 11}), ("7\n", {7}), ("\n", set()), (None, set())]
)
def test_local_cpus_are_read_from_sysfs(text: str | None, near: set[int], tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "local_cpulist").write_text(text)
    assert local_cpus(tmp_path) == near


@pytest.mark.parametrize(
    ("has", "near", "keeps"),
    [({0, 1, 2, 3}, "2-5", {2, 3}), ({0, 1}, "2-5", None), ({0, 1}, None, None)],
    ids=["some", "none of them", "unknown"],
)
def test_a_rank_is_bound_to_the_local_cpus_that_it_has(
    has: set[int], near: str | None, keeps: set[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xDC, pci_device_id=1)
    if near is not None:
        (tmp_path / "0000:dc:01.0").mkdir()
        (tmp_path / "0000:dc:01.0" / "local_cpulist").write_text(near)
    bound: dict[int, set[int]] = {}
    monkeypatch.setattr(affinity, "_PCI_DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: place)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: has)
    monkeypatch.setattr(os, "sched_setaffinity", bound.__setitem__)
    set_cpu_affinity(torch.device("cuda", 0))
    assert bound.get(os.getpid()) == keeps
