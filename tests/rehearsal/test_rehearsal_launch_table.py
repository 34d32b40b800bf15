"""The launches of a layer on the pretended device, against Megatron's layer and against what they were."""

import json
from pathlib import Path
from typing import Any

import launch_table
import pytest
from launch_table import DIRECTIONS, per_iteration
from rehearse import SKIP, rehearse

pytestmark = [pytest.mark.rehearsal, pytest.mark.run, SKIP]
SMALL = ("model.hidden_size=64", "model.seq_length=32", "moe.ffn_hidden_size=32")
# Per iteration of a chain with C = 2, forward and backward, as measured on 0.16.1 and 0.19.2. Lowering them is welcome.
MOST = (38.5, 53.5)

Found = dict[str, dict[str, Any]]


def count(folder: Path, *options: str) -> Found:
    path = folder / "found.json"
    status, out = rehearse(launch_table.__file__, "--json", path, *options, *SMALL)
    assert status == 0, out[-3000:]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return count(tmp_path_factory.mktemp("launches"))


def launches(layer: dict[str, Any]) -> tuple[float, ...]:
    return tuple(per_iteration(layer, direction)[0] for direction in DIRECTIONS)


def test_both_passes_of_a_layer_do_the_same_work(found: Found) -> None:
    for layer in found.values():
        for first, second in (layer[direction] for direction in DIRECTIONS):
            assert first == second and sum(size for _, size in first.values()) > 0


def test_the_grouped_products_of_every_iteration_are_counted(found: Found) -> None:
    for name in ("chain, C = 1", "chain, C = 2"):
        forward, backward = (found[name][direction][0]["_grouped_mm"][0] for direction in DIRECTIONS)
        iterations = found[name]["iterations"]
        assert (forward, backward) == (2 * iterations, 2 * iterations + 2)  # weights' gradients of all at once


def test_an_iteration_launches_no_more_than_it_did(found: Found) -> None:
    assert all(now <= most for now, most in zip(launches(found["chain, C = 2"]), MOST, strict=True))


def test_an_iteration_launches_less_than_megatrons_layer(found: Found) -> None:
    for stock in ("MoELayer", "MoELayer, SwiGLU fused"):
        for chain in ("chain, C = 1", "chain, C = 2"):
            assert all(
                ours < theirs for ours, theirs in zip(launches(found[chain]), launches(found[stock]), strict=True)
            )


def test_a_fused_function_is_one_launch_per_expert(found: Found) -> None:
    forward, backward = (found["MoELayer, SwiGLU fused"][direction][0] for direction in DIRECTIONS)
    assert (forward["weighted_swiglu"][0], backward["weighted_swiglu_back"][0]) == (64, 64)


def test_work_is_the_same_with_products_computed(found: Found, tmp_path: Path) -> None:
    assert count(tmp_path, "--products") == found


def test_a_planted_copy_is_noticed(found: Found, tmp_path: Path) -> None:
    wrong, right = (launches(layers["chain, C = 2"]) for layers in (count(tmp_path, "--mistake"), found))
    assert wrong[0] == right[0] + 1 > MOST[0]
