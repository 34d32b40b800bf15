"""Trains the cases on the ranks that they need, and in one process, and compares them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from combination_design import ROWS, Case
from combination_mistakes import MISTAKES
from engine_build import Trace, take_steps, use_groups
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from ranks import run_ranks
from whole_training import worst_deviations, write

from coe_megatron.checkpoint import save_load
from coe_megatron.config.settings import ParallelSettings, RunConfig
from coe_megatron.model.build import build_model
from coe_megatron.zero import engine as zero

Attempt: TypeAlias = tuple[Case, str]  # a case, and the name of a mistake in it
STEPS = 3
_AT_A_TIME = 8  # cases, in the same processes: engines of stage 3 are never freed, and their groups have threads
# Relative: losses and norms to themselves, tensors to their largest element.
LIMITS = {
    "fp32": {"losses": 1e-5, "norms": 1e-5, "gradients": 1e-5, "weights": 1e-4},
    "bf16": {"losses": 1e-2, "norms": 1e-1, "gradients": 2e-1, "weights": 1e-1},  # rounding in up to 12 iterations
}


def build(config: RunConfig) -> zero.Engine:
    """The engine of a run; weights differ from those that cases begin with."""
    torch.manual_seed(7)
    model_parallel_cuda_manual_seed(7)
    training, vocabulary = config.training, config.model.vocab_size
    assert vocabulary is not None
    micro_batches = ROWS // training.micro_batch // parallel_state.get_data_parallel_world_size()
    return zero.build_engine(build_model(config, vocabulary), config.optimizer, training, config.zero, micro_batches)


def use_groups_of(parallel: ParallelSettings) -> None:
    """The groups of a layout."""
    virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    sizes = parallel.tensor, parallel.pipeline, parallel.expert, parallel.expert_tensor, parallel.context
    use_groups(*sizes, virtual)


def taken(engine: zero.Engine, case: Case) -> Trace:
    """The steps of a case."""
    given = {"padding": case.is_padded, "documents": case.has_documents}
    return take_steps(engine, 0, STEPS, auxiliary_mean=case.config.moe.auxiliary_mean, **given)


def train_alone(folder: Path, cases: list[Case]) -> None:
    """In one process, with a checkpoint of the beginning; equal ones once."""
    for case in cases:
        if not (own := folder / f"alone {case.number}").exists():
            engine = build(case.alone_config)
            save_load.save(folder / f"begin {case.number}", 1, engine, {}, keep=1)
            write(engine, taken(engine, case), own)
            engine.destroy()


def train_together(folder: Path, cases: list[Attempt]) -> None:
    """Each on its layout, from the same beginning."""
    for case, mistake in cases:
        use_groups_of(case.config.parallel)
        _train(folder, case, mistake)  # leaves no engine behind, whose groups would outlive the next ones


def _train(folder: Path, case: Case, mistake: str) -> None:
    with MISTAKES[mistake][1]():
        engine = build(case.config)
        save_load.load_weights(folder / f"begin {case.number}", engine)
        write(engine, taken(engine, case), folder / f"{case} {mistake}")
        engine.destroy()


def measure(folder: Path, cases: Sequence[Attempt]) -> dict[Attempt, dict[str, float]]:
    """The worst deviations of each case from one process, by kind."""
    run_ranks(train_alone, 1, folder, [case for case, _ in cases], seconds=120 + 20 * len(cases))
    for ranks in sorted({case.ranks for case, _ in cases}):
        own = [(case, mistake) for case, mistake in cases if case.ranks == ranks]
        for first in range(0, len(own), _AT_A_TIME):
            some = own[first : first + _AT_A_TIME]
            run_ranks(train_together, ranks, folder, some, seconds=120 + 40 * len(some))
    found = {}
    for case, mistake in cases:
        # Rounding in bf16 moves weights by percents in two steps, from which a norm can be a third larger.
        norms = 1 if case["precision"] == "bf16" else None
        folders = folder / f"{case} {mistake}", folder / f"alone {case.number}"
        found[case, mistake] = worst_deviations(*folders, norms)
    return found


def fixed_runs(cases: Sequence[Case], times: int = 1) -> dict[str, list[list[Trace]]]:
    """Some steps of each case from a fixed seed: by case and rank what every time came to."""
    found = {}
    for ranks in sorted({case.ranks for case in cases}):
        own = [case for case in cases if case.ranks == ranks]
        of_ranks = run_ranks(train_again, ranks, own, times, seconds=60 + 10 * times * len(own))
        found |= {str(case): list(traces) for case, *traces in zip(own, *of_ranks, strict=True)}
    return found


def train_again(cases: list[Case], times: int) -> list[list[Trace]]:
    """On the ranks of the cases."""
    return [[_fixed_run(case) for _ in range(times)] for case in cases]


def _fixed_run(case: Case) -> Trace:
    use_groups_of(case.config.parallel)
    engine = build(case.config)
    trace = taken(engine, case)
    engine.destroy()
    return trace


def is_wrong(case: Case, worst: Mapping[str, float]) -> bool:
    """Whether a case is not the training of one process."""
    return any(not worst[kind] <= limit for kind, limit in LIMITS[case["precision"]].items())
