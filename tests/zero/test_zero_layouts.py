"""Any layout and ZeRO stage is the training of one process: each gradient, five steps of SGD and of AdamW, the norm.

All begin with the weights of one checkpoint; what they come to lies in checkpoints too, whole whatever the layout, and
that is where it is compared. One start of ranks goes through many cases, which build their groups anew. A few cases
cover every layout, stage, number of iterations and optimizer; those marked `slow` every layout with each of its stages,
those marked `full` are all combinations. So it is with the ways of tokens, recompute and padding, whose one process
knows of neither ways nor recompute.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from engine_build import ROWS, Trace, make_engine, take_steps, use_groups
from megatron.core import parallel_state
from model_build import EXPERTS
from ranks import run_ranks
from whole_training import worst_deviations, write

from coe_megatron.chain.settings import ChainSettings, Recompute
from coe_megatron.checkpoint import save_load as store
from coe_megatron.config.settings import OptimizerSettings

STEPS = 5
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "DP 2": (2, {}),
    "EP 2": (2, {"expert": 2}),
    "TP 2": (2, {"tensor": 2}),
    "TP 2, EP 2": (2, {"tensor": 2, "expert": 2}),
    "TP 2, ETP 2": (2, {"tensor": 2, "expert_tensor": 2}),
    "ETP 2": (2, {"expert_tensor": 2}),
    "PP 2": (2, {"pipeline": 2}),
    "EP 2, replicas 2": (4, {"expert": 2}),
    "TP 2, EP 2, DP 2": (4, {"tensor": 2, "expert": 2}),
    "EP 2, ETP 2": (4, {"expert": 2, "expert_tensor": 2}),
    "PP 2, EP 2": (4, {"pipeline": 2, "expert": 2}),
    "PP 2, TP 2": (4, {"pipeline": 2, "tensor": 2}),
    "EP 4": (4, {"expert": 4}),
}
WAYS: dict[str, dict[str, Any]] = {
    "": {},
    "deduplicated": {"deduplicated": True},
    "2 chunks": {"overlap_chunks": 2},
    "deduplicated in 2 chunks": {"deduplicated": True, "overlap_chunks": 2},
}
ATTENTIONS: dict[str, dict[str, Any] | None] = {"": None, "MLA": {}, "MLA of latent queries": {"q_lora_rank": 6}}


@dataclass(frozen=True)
class Case:
    """One training; `offload` and `balancing` as make_engine takes them, `way` in WAYS, `attention` in
    ATTENTIONS.
    """

    layout: str
    stage: int
    iterations: int
    optimizer: str
    offload: str = ""
    balancing: str = "seq_aux_loss"
    precision: str = "fp32"
    way: str = ""
    recompute: str = "none"
    padding: bool = False
    attention: str = ""

    @property
    def ranks(self) -> int:
        return LAYOUTS[self.layout][0]

    def __str__(self) -> str:
        offloaded = f"{self.offload} offloaded" if self.offload else ""
        special = self.balancing.removeprefix("seq_aux_loss"), self.precision.removeprefix("fp32")
        recompute = f"recompute {self.recompute}" if self.recompute != "none" else ""
        more = [
            part
            for part in (offloaded, *special, self.way, recompute, "padding" * self.padding, self.attention)
            if part
        ]
        return ", ".join([self.layout, f"stage {self.stage}", f"C {self.iterations}", self.optimizer, *more])


def stages(layout: str) -> tuple[int, ...]:
    return (0, 1) if "PP" in layout else (0, 1, 2, 3)


ALL = [
    Case(layout, stage, iterations, optimizer)
    for layout in LAYOUTS
    for stage in stages(layout)
    for iterations in (1, 2, 3)
    for optimizer in ("SGD", "AdamW")
]
OFFLOADED = [
    Case("EP 2", stage, 2, optimizer, offload)
    for stage, offload in ((1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "optimizer parameters"))
    for optimizer in ("SGD", "AdamW")
]
# Every layout with each of its stages, and what can be offloaded; C and the optimizer take turns.
COVERING = [
    *(
        Case(layout, stage, 1 + (number + stage) % 3, ("SGD", "AdamW")[(number // 2 + stage) % 2])
        for number, layout in enumerate(LAYOUTS)
        for stage in stages(layout)
    ),
    *(OFFLOADED[2 * number + number % 2] for number in range(4)),
]
# Of these a stage of each layout on two ranks, in turn.
FEW = [
    next(
        case for case in COVERING if (case.layout, case.stage) == (layout, stages(layout)[number % len(stages(layout))])
    )
    for number, (layout, (ranks, _)) in enumerate(LAYOUTS.items())
    if ranks == 2
]
REST = [case for case in ALL + OFFLOADED if case not in COVERING]
# Tokens may travel any way: two ranks, four, and the rest, where all else takes turns.
FEW_WITH_WAYS = [
    Case("EP 2", 3, 2, "SGD", way="deduplicated in 2 chunks", recompute="iteration", padding=True),
    Case("TP 2, EP 2", 2, 3, "AdamW", way="deduplicated", recompute="layer"),
    Case("TP 2, ETP 2", 0, 3, "AdamW", way="deduplicated in 2 chunks", recompute="experts"),
    Case("PP 2", 1, 2, "SGD", way="2 chunks", padding=True),
    Case("EP 2, replicas 2", 3, 3, "AdamW", way="2 chunks", recompute="iteration"),
    Case("TP 2, EP 2, DP 2", 2, 2, "SGD", way="deduplicated in 2 chunks", recompute="layer", padding=True),
    Case("EP 2, ETP 2", 1, 3, "SGD", way="deduplicated", recompute="experts"),
    Case("PP 2, EP 2", 1, 2, "SGD", way="deduplicated in 2 chunks", recompute="iteration", padding=True),
    Case("PP 2, TP 2", 0, 3, "AdamW", way="2 chunks"),
    Case("EP 4", 3, 2, "AdamW", way="deduplicated"),
]
WITH_LATENTS = [
    Case("TP 2", 1, 2, "SGD", attention="MLA"),
    Case("TP 2, ETP 2", 3, 2, "SGD", attention="MLA of latent queries"),
    Case("TP 2, EP 2, DP 2", 2, 2, "SGD", attention="MLA of latent queries"),
    Case("PP 2, TP 2", 0, 2, "SGD", attention="MLA"),
]
REST_WITH_WAYS = [
    Case(
        layout,
        stages(layout)[(number + turn) % len(stages(layout))],
        2 + turn % 2,
        ("SGD", "AdamW")[(number + turn // 2) % 2],
        way=way,
        recompute=get_args(Recompute)[(number + turn) % 4],
    )
    for number, layout in enumerate(LAYOUTS)
    for turn, way in enumerate(list(WAYS)[1:])
]


@contextmanager
def optimizer(name: str) -> Iterator[None]:
    """While this lasts AdamW's steps are plain SGD's, if asked: AdamW hides wrong scales of gradients."""
    step = torch.optim.AdamW.step
    torch.optim.AdamW.step = descend if name == "SGD" else step  # type: ignore[method-assign, assignment]
    yield
    torch.optim.AdamW.step = step  # type: ignore[method-assign]


@torch.no_grad()
def descend(self: torch.optim.AdamW) -> None:
    for group in self.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter -= group["lr"] * parameter.grad


def engine_of(case: Case, micro_batch: int, **more: Any) -> Any:
    # Where a gradient is near zero AdamW's first steps are its sign, that is rounding: eps far above it makes them
    # as smooth as the gradients are.
    settings = OptimizerSettings(lr=1e-2, clip=0.1, eps=1e-4)
    chain = ChainSettings(iterations=case.iterations)
    if case.precision == "bf16":
        more |= {
            "topk": EXPERTS
        }  # all of them: TP rounds otherwise, and a token at another expert is no small difference
    more |= {"stage": case.stage, "offload": case.offload, "balancing": case.balancing, "precision": case.precision}
    more |= {"recompute": case.recompute, **WAYS[case.way]}
    more |= {"latents": ATTENTIONS[case.attention]}
    return make_engine(micro_batch, chain=chain, optimizer=settings, **more)


def train_alone(folder: Path) -> None:
    for iterations in (1, 2, 3):
        begin(folder, Case("alone", 1, iterations, ""))
        for name in ("SGD", "AdamW"):
            train_case(Case("alone", 1, iterations, name), folder, micro_batch=8)
    for balancing in ("aux_loss", "global_aux_loss"):
        train_case(Case("alone", 1, 2, "SGD", balancing=balancing), folder, micro_batch=8)
    train_case(Case("alone", 1, 2, "SGD", precision="bf16"), folder, micro_batch=8)
    for attention in ("MLA", "MLA of latent queries"):
        case = Case("alone", 1, 2, "SGD", attention=attention)
        begin(folder, case)
        train_case(case, folder, micro_batch=8)
    # The z-loss is a mean over a micro-batch's places that count: the same micro-batches as of many ranks.
    train_case(Case("alone", 1, 2, "SGD", padding=True), folder, micro_batch=2)


def begin(folder: Path, case: Case) -> None:
    """The checkpoint that all cases of these iterations and this attention begin with."""
    store.save(beginning(folder, case), 1, engine_of(case, 8), {}, keep=1)


def beginning(folder: Path, case: Case) -> Path:
    return folder / f"begin {case.iterations} {case.attention}".strip()


def trained(engine: Any, case: Case) -> Trace:
    with optimizer(case.optimizer):
        return take_steps(engine, 0, STEPS, rate=RATES[case.optimizer], padding=case.padding)


# SGD's gradients are clipped to 0.1 in all: a rate at which its steps are as long as AdamW's.
RATES = {"SGD": 1.0, "AdamW": 1e-2}


def train_together(folder: Path, cases: list[Case]) -> None:
    for case in cases:
        _, layout = LAYOUTS[case.layout]
        use_groups(**layout)
        # Four or two micro-batches a step; one where a balancing loss looks at a whole batch.
        replicas = parallel_state.get_data_parallel_world_size()
        train_case(case, folder, 2 if case.balancing == "seq_aux_loss" else ROWS // replicas)
    # A group has three threads, and those of a case do not pile up; only DeepSpeed's stage 3 never lets go of them.
    assert len(os.listdir("/proc/self/task")) < 100 + 30 * len(cases)


def train_case(case: Case, folder: Path, micro_batch: int) -> None:
    engine = engine_of(case, micro_batch, seed=7)
    store.load_weights(beginning(folder, case), engine)
    write(engine, trained(engine, case), folder / str(case))
    engine.destroy()  # or its hooks keep it, and the groups it knows


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what one process begins with and comes to."""
    folder = tmp_path_factory.mktemp("layouts")
    run_ranks(train_alone, 1, folder)
    return folder


@pytest.mark.ranks
@pytest.mark.timeout(600)
def test_few_cases_are_the_training_of_one_process(alone: Path) -> None:
    assert {case.stage for case in FEW} == {0, 1, 2, 3} and {case.iterations for case in FEW} == {1, 2, 3}
    compare(alone, FEW)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [2, 4])
def test_covering_cases_are_the_training_of_one_process(alone: Path, ranks: int) -> None:
    compare(alone, [case for case in COVERING if case.ranks == ranks and case not in FEW])


@pytest.mark.full
@pytest.mark.ranks
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("ranks", [2, 4])
def test_all_cases_are_the_training_of_one_process(alone: Path, ranks: int, iterations: int) -> None:
    compare(alone, [case for case in REST if (case.ranks, case.iterations) == (ranks, iterations)])


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [2, 4])
def test_tokens_may_travel_any_way(alone: Path, ranks: int) -> None:
    cases = [case for case in FEW_WITH_WAYS if case.ranks == ranks]
    assert {case.stage for case in cases} == {0, 1, 2, 3} and {case.way for case in cases} == {*WAYS} - {""}
    assert {case.recompute for case in cases} == {*get_args(Recompute)}
    compare(alone, cases)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 4])
def test_latents_may_be_split(alone: Path, ranks: int) -> None:
    compare(alone, [case for case in WITH_LATENTS if case.ranks == ranks])


@pytest.mark.full
@pytest.mark.ranks
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [2, 4])
def test_tokens_may_travel_any_way_in_all_layouts(alone: Path, ranks: int) -> None:
    compare(alone, [case for case in REST_WITH_WAYS if case.ranks == ranks])


@pytest.mark.slow
@pytest.mark.ranks
def test_batch_losses_need_the_statistics_of_all_ranks(alone: Path) -> None:
    """`aux_loss` balances each rank's micro-batch by itself, which is another loss; `global_aux_loss` is the same."""
    same, other = (
        [Case(layout, 1, 2, "SGD", balancing=name) for layout in ("DP 2", "EP 2", "TP 2, EP 2")]
        for name in ("global_aux_loss", "aux_loss")
    )
    worst = train_and_measure(alone, same + other)
    assert beyond_limits(worst) == {str(case) for case in other if case.layout != "TP 2, EP 2"}


@pytest.mark.slow
@pytest.mark.ranks
def test_bf16_is_the_training_of_one_process_but_for_its_rounding(alone: Path) -> None:
    cases = [
        Case(layout, stage, 2, "SGD", precision="bf16")
        for layout, stage in (("EP 2", 1), ("TP 2, EP 2", 2), ("TP 2", 3), ("PP 2", 1))
    ]
    limits = {"norms": 1e-2, "losses": 3e-3, "gradients": 1e-1, "weights": 1e-2}
    assert beyond_limits(train_and_measure(alone, cases), limits) == set()


def compare(folder: Path, cases: list[Case]) -> None:
    assert beyond_limits(train_and_measure(folder, cases)) == set()


def train_and_measure(folder: Path, cases: list[Case]) -> dict[str, dict[str, float]]:
    (ranks,) = {case.ranks for case in cases}
    run_ranks(train_together, ranks, folder, cases, seconds=60 + 30 * len(cases))
    worst = {str(case): deviations(folder, case) for case in cases}
    for case, found in worst.items():
        print(case, *(f"{kind} {deviation:.1e}" for kind, deviation in found.items()), sep=", ")
    return worst


LIMITS = {"norms": 1e-5, "losses": 1e-5, "gradients": 1e-5, "weights": 1e-4}


def beyond_limits(worst: dict[str, dict[str, float]], limits: dict[str, float] = LIMITS) -> set[str]:
    return {case for case, found in worst.items() if any(found[kind] > limits[kind] for kind in found)}


ALONE = {"layout": "alone", "stage": 1, "offload": "", "way": "", "recompute": "none"}


def deviations(folder: Path, case: Case) -> dict[str, float]:
    """By kind the worst deviation from one process, relative to the value, or to a tensor's largest."""
    return worst_deviations(folder / str(case), folder / str(replace(case, **ALONE)))
