"""The warning of an all-to-all that leaves its node."""

from dataclasses import replace

import pytest

from coe_megatron.config import RunConfig
from coe_megatron.config.settings import ParallelSettings, TrainingSettings
from coe_megatron.estimate.node_crossing import needless_crossing
from coe_megatron.estimate.run_estimate import estimate, size
from coe_megatron.estimate.run_shape import RunShape

VOCABULARY = 512


def warning(**parallel: int) -> tuple[RunConfig, str | None]:
    config = RunConfig(parallel=ParallelSettings(**parallel), training=TrainingSettings(global_batch=3072))
    run = RunShape.of(config, VOCABULARY)
    return config, needless_crossing(run, estimate(run))


@pytest.mark.parametrize(
    ("expert", "ranks_per_node", "better"),
    [(16, 8, 8), (8, 4, 4), (2, 1, 1), (4, 6, 2)],  # of EP 4 on nodes of 6 one group in three lies in two
)
def test_what_would_stay_inside_and_what_it_costs(expert: int, ranks_per_node: int, better: int) -> None:
    config, said = warning(expert=expert, ranks_per_node=ranks_per_node, world_size=32)
    assert said is not None and f"parallel.expert={better} would keep it inside nodes, with " in said
    here = estimate(RunShape.of(config, VOCABULARY))
    there = estimate(RunShape.of(replace(config, parallel=replace(config.parallel, expert=better)), VOCABULARY))
    assert f"sends {size(here.communication['all_to_all'].across_nodes)} per rank and step across nodes" in said
    assert said.endswith(f"{size(there.needed - here.needed)} more memory per rank") and there.needed > here.needed
    assert there.communication["all_to_all"].across_nodes == 0


@pytest.mark.parametrize("expert", [1, 2, 8])
def test_inside_a_node_there_is_nothing_to_say(expert: int) -> None:
    assert warning(expert=expert, ranks_per_node=8, world_size=64)[1] is None
