"""The resume matrix: saved on one layout and taken up on another, a run goes on as it would have where it was saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_build import Trace, make_engine, take_steps, use_groups
from ranks import run_ranks

from coe_megatron.checkpoint import save_load
from coe_megatron.config.settings import OptimizerSettings

SAVED, MORE = 3, 5
# Ranks, ZeRO stage, what the groups are cut by, and how tokens travel and what is recomputed.
LAYOUTS: dict[str, tuple[int, int, dict[str, int], dict[str, Any]]] = {
    "one process": (1, 1, {}, {}),
    "EP 2": (2, 1, {"expert": 2}, {"deduplicated": True, "recompute": "layer"}),
    "TP 2": (2, 1, {"tensor": 2}, {}),
    "CP 2": (2, 1, {"context": 2}, {"recompute": "layer"}),
    "ZeRO-3, EP 2": (2, 3, {"expert": 2}, {"deduplicated": True, "overlap_chunks": 2, "recompute": "iteration"}),
    "PP 2": (2, 1, {"pipeline": 2}, {"overlap_chunks": 2}),
    "PP 2 interleaved": (2, 1, {"pipeline": 2, "virtual_pipeline": 2}, {}),
}


def engine_of(layout: str, seed: int) -> torch.nn.Module:
    _, stage, cut, way = LAYOUTS[layout]
    use_groups(**cut)
    # A large eps: AdamW's first steps are a gradient's sign where it is near zero, which is rounding.
    optimizer = OptimizerSettings(lr=1e-2, clip=0.1, eps=1e-4)
    return make_engine(2, stage=stage, seed=seed, layers=4, optimizer=optimizer, **way)


def save(folder: Path, layouts: list[str]) -> dict[str, Trace]:
    """Three steps, a checkpoint, and five steps more."""
    return {layout: save_and_go_on(folder / layout, layout) for layout in layouts}


def save_and_go_on(folder: Path, layout: str) -> Trace:
    engine = engine_of(layout, seed=1)
    take_steps(engine, 0, SAVED)
    save_load.save(folder, SAVED, engine, {"layout": layout}, keep=1)
    return take_steps(engine, SAVED, MORE)


def load(folder: Path, layouts: list[str]) -> dict[tuple[str, str], Trace]:
    return {(there, here): load_and_go_on(folder / there, here) for here in layouts for there in LAYOUTS}


def load_and_go_on(folder: Path, layout: str) -> Trace:
    engine = engine_of(layout, seed=7)
    assert save_load.load_latest(folder, engine) == {"layout": folder.name}
    return take_steps(engine, SAVED, MORE)


def on_all_ranks(function, folder: Path) -> list[dict]:
    """What rank 0 of one rank, and both of two, have to tell of the layouts that suit them."""
    found = []
    for ranks in (1, 2):
        suited = [layout for layout, (needed, *_) in LAYOUTS.items() if needed == ranks]
        found.append(run_ranks(function, ranks, folder, suited, seconds=600))
    (alone,), pair = found
    return [alone | rank for rank in pair]


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(900)
def test_a_run_goes_on_from_any_layout_on_any_other(tmp_path: Path) -> None:
    went_on, taken_up = on_all_ranks(save, tmp_path), on_all_ranks(load, tmp_path)
    for (there, here), trace in taken_up[0].items():
        expected = went_on[0][there]
        if here == there:
            for mine, theirs in zip(taken_up, went_on, strict=True):
                found, truth = mine[there, here], theirs[there]
                assert (found.losses, found.norms) == (truth.losses, truth.norms), here
                assert all(torch.equal(found.weights[name], weight) for name, weight in truth.weights.items()), here
        assert trace.losses == pytest.approx(expected.losses, rel=1e-4), (there, here)
        assert trace.norms == pytest.approx(expected.norms, rel=1e-4), (there, here)
