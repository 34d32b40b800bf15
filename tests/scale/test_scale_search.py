"""The search for a layout against all layouts, and what its option prints."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import get_args

import pytest
from programs import python

from coe_megatron.chain.settings import Recompute
from coe_megatron.config import load, parse
from coe_megatron.config.checks import problems
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.machine import machine
from coe_megatron.estimate.memory import memory
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.estimate.step_time import step_time
from coe_megatron.scale.search import Search

H100 = machine("h100")


def search(ranks: int = 8, available: float = 2e9, size: int = 4, **training: object) -> Search:
    """For a model whose layers, heads and experts have few divisors if `size` is small."""
    config = parse(
        {
            "model": {"num_layers": size, "hidden_size": 256, "num_attention_heads": size, "seq_length": 512},
            "moe": {"num_experts": 4 * size, "topk": 2, "ffn_hidden_size": 512, "overlap_chunks": 1},
            "chain": {"iterations": 2},
            "training": {"global_batch": 16, "precision": "bf16", "micro_batch": 1, **training},
        }
    )
    return Search(RunShape.of(config, 8192, ranks), H100, available)


def fastest_of_all(one: Search) -> tuple[float, int]:
    """The time of the fastest layout, and how many layouts fit, by trying everything."""
    times = []
    for sizes in one._layouts:
        ways = product(("alltoall", "deduplicated"), (1, 2, 4)) if sizes.expert > 1 else [("alltoall", 1)]
        for stage, mode, (dispatcher, chunks) in product((1, 2, 3), get_args(Recompute), list(ways)):
            config = one._config(sizes, False)
            moe = replace(config.moe, recompute=mode, dispatcher=dispatcher, overlap_chunks=chunks)
            config = replace(config, moe=moe, zero=replace(config.zero, stage=stage))
            if next(problems(config, one.ranks), None) is None:
                run = one.run.changed(config)
                if max(memory(run, each).total for each in {0, run.layout.pipeline - 1}) <= one.available:
                    times.append(step_time(run, H100).total)
    return min(times), len(times)


@pytest.mark.thorough
@pytest.mark.parametrize("available", [2e9, 2e8])
def test_nothing_is_faster_than_what_is_found(available: float) -> None:
    one = search(2, available, size=2, global_batch=4)
    found = one.best(5)
    fastest, fitting = fastest_of_all(one)
    assert fitting > 100
    assert found.best[0].time.total == pytest.approx(fastest)
    assert [each.time.total for each in found.best] == sorted(each.time.total for each in found.best)
    assert all(each.needed <= available for each in found.best)


def test_few_layouts_are_timed() -> None:
    one = search(64, global_batch=512)
    found = one.best(5)
    assert found.layouts > 1000 and found.tried < found.layouts / 10


def test_how_the_run_divides_its_ranks_does_not_matter() -> None:
    """Stage 3 excludes pipelines, for example, which may be faster."""
    one = search(16)
    config = one.run.config
    moe = replace(config.moe, dispatcher="deduplicated", overlap_chunks=4, recompute="layer")
    other = replace(config, moe=moe, zero=replace(config.zero, stage=3))
    changed = replace(one, run=one.run.changed(other))
    found, expected = changed.best(5), one.best(5)
    assert [each.run for each in found.best] == [each.run for each in expected.best]
    assert (found.layouts, found.tried) == (expected.layouts, expected.tried)


def test_more_memory_is_never_slower() -> None:
    times = [search(available=available).best(1).best[0].time.total for available in (2.5e8, 5e8, 1e9, 4e9)]
    assert times == sorted(times, reverse=True)


def test_optimizer_states_go_to_the_host_if_nothing_fits_without() -> None:
    needed = min(each.needed for each in search(1).best(50).best)
    tight = search(1, needed / 2).best(1).best[0]
    assert tight.run.config.zero.offload_optimizer and tight.needed <= needed / 2


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ConfigError, match=r"^no layout divides 7 ranks, batch, layers and experts; 8 would$"):
        search(7).best(5)
    with pytest.raises(ConfigError, match=r"^none of \d+ layouts of 8 ranks fits into 0 GiB$"):
        search(available=1e6).best(5)


def test_a_slower_layout_says_where_it_loses() -> None:
    first, *others = search(16).best(5).best
    assert first.why_slower(first) == ""
    assert all("+" in each.why_slower(first) for each in others if each.time.total > 1.001 * first.time.total)


@pytest.mark.run
def test_the_option_prints_layouts_and_writes_a_config(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(
        "base: quickstart.yaml\nmodel: {vocab_size: 2048}\ntraining: {precision: bf16, global_batch: 64}\n"
    )
    found = python(
        "launch/pretrain_coe.py", config, "--suggest", "--machine", "h100", "--save-config", tmp_path / "best.yaml"
    )
    assert found.returncode == 0, found.stderr
    assert "8 ranks of 8 H100 SXM" in found.stdout and "layouts" in found.stdout
    best = load(tmp_path / "best.yaml")
    assert (best.parallel.world_size, best.model.vocab_size) == (8, 2048)
    shown = python("launch/pretrain_coe.py", tmp_path / "best.yaml", "--dry-run", "--machine", "h100")
    assert "time of a step" in shown.stdout and "not measured" in shown.stdout
