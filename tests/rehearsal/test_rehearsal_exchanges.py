"""Tokens between two ranks on a pretended CUDA device: the CPU's numbers, few waits of the host, and no early reads."""

from typing import Any

import exchanges
import pytest
import torch
from ranks import run_ranks
from rehearse import SKIP, rehearse

pytestmark = [pytest.mark.rehearsal, pytest.mark.run, SKIP]
Found = dict[exchanges.Case, dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Found]]:
    path = tmp_path_factory.mktemp("exchanges") / "found.pt"
    status, out = rehearse(exchanges.__file__, path, ranks=2)
    assert status == 0, out[-3000:]
    return [torch.load(f"{path}.{rank}", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def truth() -> list[Found]:
    return run_ranks(exchanges.run_all, 2)


def tensors(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("case", exchanges.CASES, ids=", ".join)
def test_a_layer_computes_what_it_does_on_the_cpu_and_reads_nothing_early(
    case: exchanges.Case, found: list[dict[str, Found]], truth: list[Found]
) -> None:
    for ours, theirs in zip(found, truth, strict=True):
        for name, value in tensors(theirs[case]).items():
            torch.testing.assert_close(ours[""][case][name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", exchanges.CASES, ids=", ".join)
def test_the_host_waits_for_sizes_alone(case: exchanges.Case, found: list[dict[str, Found]]) -> None:
    """Once for each iteration of a chunk in the forward pass, never in the backward pass, recomputed or not."""
    layout, way, _ = case
    chunks = exchanges.WAYS[way].get("overlap_chunks", 1)
    forward = 0 if layout == "DP 2" else exchanges.ITERATIONS * chunks
    for of_rank in found:
        assert (of_rank[""][case]["forward waits"], of_rank[""][case]["backward waits"]) == (forward, 0)


@pytest.mark.parametrize("mistake", exchanges.MISTAKES)
def test_an_early_read_is_noticed(mistake: str, found: list[dict[str, Found]]) -> None:
    for of_rank in found:
        for case, values in of_rank[mistake].items():
            assert values["out"].isfinite().all() == (mistake == "early gradients"), case
            assert not values["input"].isfinite().all(), case
