"""Layers of all kinds on a pretended CUDA device: the CPU's numbers, and a known number of waits of the host."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import layers
import pytest
import torch
from rehearse import SKIP, rehearse

pytestmark = [pytest.mark.rehearsal, pytest.mark.run, SKIP]
SCRIPT = Path(layers.__file__)
# Per iteration, forward and backward. Megatron's dispatchers copy counts to the host, and its permutation selects rows
# twice in 0.16.1 (in 0.19.2 only with `allgather`, and once).
ROWS = 2 if version("megatron-core").startswith("0.16") else 0
STOCK = (1 + ROWS, 0)  # in fp32 too: its experts are plain products
FP32 = (2, 2)  # without fast kernels each grouped product reads its offsets on the host
WEIGHTS = 2  # so do those of the weights' gradients, once for all iterations
ALLGATHER = (3 if ROWS else 2, 0)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    path = tmp_path_factory.mktemp("layers") / "found.pt"
    status, out = rehearse(SCRIPT, path)
    assert status == 0, out[-3000:]
    return torch.load(path, weights_only=False)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    path = tmp_path_factory.mktemp("layers") / "truth.pt"
    status, out = rehearse(SCRIPT, path, on_cpu=True)
    assert status == 0, out[-3000:]
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("name", [*layers.CASES, *layers.EXPERTS])
def test_layers_compute_what_they_do_on_the_cpu(name: str, found: dict, truth: dict) -> None:
    ours, theirs = found[name], truth[name]
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert ours[key].isfinite().all(), key
            torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6, msg=key)
    assert str(ours.get("report")) == str(theirs.get("report"))


@pytest.mark.parametrize("name", layers.CASES)
def test_the_host_waits_no_more_than_it_did(name: str, found: dict) -> None:
    assert (found[name]["forward waits"], found[name]["backward waits"]) == expected_waits(name)


def expected_waits(name: str) -> tuple[int, int]:
    _, chain, _ = layers.CASES[name]
    iterations = chain.get("iterations", 2)
    forward, backward = {"fp32": FP32, "allgather": ALLGATHER, "capacity": STOCK}.get(name, (0, 0))
    return forward * iterations, backward * iterations + (WEIGHTS if name == "fp32" else 0)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_megatrons_layer_waits_as_often_per_pass(precision: str, found: dict) -> None:
    assert tuple(found[f"stock, {precision}"].values()) == STOCK


def test_padded_values_get_flash_attention(found: dict, truth: dict) -> None:
    (plain, kernel), (padded, other) = found["attention"].values()
    assert (kernel, other) == (["memory-efficient"], ["flash"])
    for out in (plain, padded):
        torch.testing.assert_close(out, truth["attention"][False][0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mistake", layers.MISTAKES)
def test_a_planted_mistake_is_noticed(mistake: str, found: dict, tmp_path: Path) -> None:
    status, out = rehearse(SCRIPT, tmp_path / "found.pt", mistake)
    if mistake == "a tensor on another device":
        assert status != 0 and "found at least two devices" in out
        return
    assert status == 0, out[-3000:]
    wrong = torch.load(tmp_path / "found.pt", weights_only=False)
    if mistake == "a read in the layer":
        assert wrong["forward waits"] > found["bf16"]["forward waits"]
    else:
        assert not wrong["out 0"].isfinite().all()
