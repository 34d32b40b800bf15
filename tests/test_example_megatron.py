"""The loop of a Megatron user, examples/chain_in_megatron.py, on several ranks against one process.

All begin with the weights of the one process: a rank takes its stage's layers and its experts.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import chain_in_megatron as example
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from model_build import Named, errors, reset_megatron
from ranks import run_ranks

from coe_megatron.chain.settings import ChainSettings

ITERATIONS = (1, 2, 3)
STEPS, CLIP = 5, 0.5
COEFFICIENT = 0.1  # of `seq_aux_loss`
OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    # Where a gradient is nearly zero AdamW's step is its sign, which rounding decides unless eps is larger than that.
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, eps=1e-6),
}
LAYOUTS = {
    "expert": (2, {"expert_model_parallel_size": 2}),
    "pipeline": (2, {"pipeline_model_parallel_size": 2}),
    "context x expert": (2, {"context_parallel_size": 2, "expert_model_parallel_size": 2}),
    "pipeline x expert": (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
}
Found = dict[str, dict[str, float]]  # training -> kind -> worst deviation
BOUNDS = {"norms": 1e-5, "gradients": 1e-5, "weights": 1e-4, "losses": 1e-5}  # relative to the tensor's maximum


def train(iterations: int, optimizer: str, begin: Named | None = None, **changes: object) -> dict[str, Named]:
    """This rank's part of a training: gradients of the first step, weights before and after, norms and losses."""
    model = build(iterations, **changes)
    if begin is not None:
        load(model, begin)
    begin = {name: weight.detach().clone() for name, weight in parts(model).items()}
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(example.VOCABULARY, (example.ROWS, example.LENGTH + 1), generator=generator)
    step = OPTIMIZERS[optimizer](model.parameters())
    losses, norms, gradients = [], [], {}
    for _ in range(STEPS):
        loss, norm = example.train_step(model, step, rows, clip=CLIP)
        losses.append(loss)
        norms.append(norm)
        gradients = gradients or {name: weight.main_grad.clone() for name, weight in parts(model).items()}
    return {
        "begin": begin,
        "gradients": gradients,
        "weights": {name: weight.detach() for name, weight in parts(model).items()},
        "norms": {"norm": torch.tensor(norms)},
        "losses": {"loss": torch.tensor(losses)} if parallel_state.is_pipeline_last_stage() else {},
    }


def build(iterations: int, **changes: object) -> DistributedDataParallel:
    reset_megatron()
    model_parallel_cuda_manual_seed(1)
    expert = parallel_state.get_expert_model_parallel_world_size()
    pipeline, context = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
    )
    config = example.configure(expert, pipeline, context)
    config = replace(config, **({"moe_aux_loss_coeff": COEFFICIENT, "moe_z_loss_coeff": 0.01} | changes))
    return example.build(config, ChainSettings(iterations=iterations), torch.device("cpu"))


def parts(model: DistributedDataParallel) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters under the names that they have in the whole model."""
    before = model.module.decoder.layers[0].layer_number - 1
    named = model.module.named_parameters()
    return {re.sub(r"(?<=layers\.)\d+", lambda n: str(int(n[0]) + before), name): weight for name, weight in named}


def part_of(name: str, whole: torch.Tensor) -> torch.Tensor:
    """What of a tensor this rank holds: its experts, all else as it is."""
    if ".mlp.experts." not in name:
        return whole
    ranks = parallel_state.get_expert_model_parallel_world_size()
    return whole.chunk(ranks)[parallel_state.get_expert_model_parallel_rank()]


@torch.no_grad()
def load(model: DistributedDataParallel, whole: Named) -> None:
    for name, weight in parts(model).items():
        weight.copy_(part_of(name, whole[name]))


def compare(folder: Path, iterations: int, optimizer: str, **changes: object) -> dict[str, float]:
    """Train this rank's part; the worst deviation of each kind from what one process left in `folder`."""
    alone = torch.load(folder / f"{iterations} {optimizer}")
    here = train(iterations, optimizer, alone["begin"], **changes)
    return {
        kind: max(errors(values, {name: part_of(name, alone[kind][name]) for name in values}).values(), default=0.0)
        for kind, values in here.items()
        if kind != "begin"
    }


def train_together(folder: Path) -> tuple[Found, Found]:
    """What this rank found of trainings that should be that of one process, and of some with a mistake."""
    right = {f"C = {c}, {kind}": compare(folder, c, kind) for c in ITERATIONS for kind in OPTIMIZERS}
    right["loss by tokens"] = compare(folder, 2, "sgd", calculate_per_token_loss=True)
    with mock.patch.object(example, "gradient_norm", norm_of_one_rank):
        wrong = {"norm of one rank": compare(folder, 2, "sgd")}
    wrong["experts doubled"] = compare(folder, 2, "sgd", finalize_model_grads_func=doubled)
    if parallel_state.get_data_parallel_world_size() > 1:
        wrong["experts averaged"] = compare(folder, 2, "sgd", finalize_model_grads_func=averaged)
    return right, wrong


def norm_of_one_rank(model: DistributedDataParallel) -> float:
    return float(torch.nn.utils.get_total_norm([weight.main_grad for weight in model.parameters()]))


def doubled(models: list[DistributedDataParallel], *args: object, **more: object) -> None:
    finalize_model_grads(models, *args, **more)
    for gradient in expert_gradients(models[0]):
        gradient.mul_(2)


def averaged(models: list[DistributedDataParallel], *args: object, **more: object) -> None:
    """As if experts were dense weights: the mean of ranks that hold different ones."""
    finalize_model_grads(models, *args, **more)
    for gradient in expert_gradients(models[0]):
        torch.distributed.all_reduce(
            gradient, op=torch.distributed.ReduceOp.AVG, group=parallel_state.get_data_parallel_group()
        )


def expert_gradients(model: DistributedDataParallel) -> list[torch.Tensor]:
    return [weight.main_grad for name, weight in parts(model).items() if ".mlp.experts." in name]


@pytest.fixture(scope="module")
def alone(megatron_groups: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one process did, for every C and optimizer."""
    folder = tmp_path_factory.mktemp("alone")
    for iterations in ITERATIONS:
        for optimizer in OPTIMIZERS:
            torch.save(train(iterations, optimizer), folder / f"{iterations} {optimizer}")
    return folder


@pytest.fixture(scope="module", params=LAYOUTS)
def found(request: pytest.FixtureRequest, alone: Path) -> list[tuple[Found, Found]]:
    """What each rank of a layout found."""
    ranks, groups = LAYOUTS[request.param]
    return run_ranks(train_together, ranks, alone, **groups)


@pytest.mark.ranks
@pytest.mark.slow
def test_several_ranks_train_as_one_does(found: list[tuple[Found, Found]]) -> None:
    for rank, (right, _) in enumerate(found):
        assert len(right) == len(ITERATIONS) * len(OPTIMIZERS) + 1
        for what, worst in right.items():
            assert all(worst[kind] < bound for kind, bound in BOUNDS.items()), (rank, what, worst)


@pytest.mark.ranks
@pytest.mark.slow
def test_mistakes_would_show(found: list[tuple[Found, Found]]) -> None:
    for rank, (_, wrong) in enumerate(found):
        for what, worst in wrong.items():
            assert all(worst[kind] > BOUNDS[kind] for kind in ("gradients", "norms")), (rank, what, worst)
