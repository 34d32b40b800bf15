"""The layer on two ranks, with expert and with tensor parallelism, against the oracle and Megatron's layer on one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_layer import TransformerLayer
from modules_build import (
    EXPERTS,
    HIDDEN,
    LOSSES,
    SEQUENCE,
    copy_from_oracle,
    copy_from_stock,
    errors,
    gradient,
    local_part,
    make_coe,
    make_config,
    make_layer,
    make_oracle,
    make_stock,
    parts_of,
    reset_megatron,
    stock_named,
    tracked_losses,
)
from modules_checkpoint import load, make_stock_layer, save, scramble, sub_layer
from modules_oracle import CHAINS, chain_of, make_batch, oracle_step
from ranks import run_ranks

from coe_megatron.chain.settings import ChainSettings

TOLERANCE = 1e-5  # relative to the largest entry, fp32
SHARED = {"moe_shared_expert_intermediate_size": 40}
EXPERT = {"expert_model_parallel_size": 2}
TENSOR = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
MIXED = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
ROUTERS: dict[str, dict[str, Any]] = {
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "mean": {},
    "recompute": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "sigmoid": {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False},
    "all of N": {"moe_router_topk": EXPERTS},
}
STOCK: dict[str, dict[str, Any]] = {
    "losses": {**LOSSES, "moe_shared_expert_intermediate_size": 40},
    "aux_loss": {**LOSSES, "moe_router_load_balancing_type": "aux_loss"},
    "global_aux_loss": {**LOSSES, "moe_router_load_balancing_type": "global_aux_loss"},
    "allgather": {**LOSSES, "moe_token_dispatcher_type": "allgather"},
    "capacity": {"moe_expert_capacity_factor": 0.7},
    "capacity, padded": {"moe_expert_capacity_factor": 0.7, "moe_pad_expert_input_to_capacity": True},
}


def use_layout(layout: dict[str, int]) -> None:
    """Other process groups on the same ranks."""
    reset_megatron()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**layout)
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)


def parallel_config(layout: dict[str, int], **changes: Any) -> Any:
    tensor = layout.get("tensor_model_parallel_size", 1) > 1
    return make_config(**layout, sequence_parallel=tensor, **changes)


def sub_layer_errors(
    layout: dict[str, int], chain: ChainSettings, crowd: bool = False, **changes: Any
) -> dict[str, float]:
    """How far this rank's part of h', of the input's gradient and of each parameter's gradient is from the oracle's.

    Data-parallel ranks hold different sequences, tensor-parallel ranks different places of all sequences.
    """
    config = parallel_config(layout, **LOSSES, **SHARED, **changes)
    torch.manual_seed(2)
    oracle, layer = make_oracle(config, chain), make_layer(config, chain)
    h_BSD, grad_BSD = make_batch(HIDDEN, batch=4)
    if crowd:  # every token to expert 0: a rank without it has no rows
        _send_all_to_expert_0(oracle, h_BSD)
    copy_from_oracle(layer, oracle)
    truth = oracle_step(oracle, h_BSD, grad_BSD)
    h_SBD = _of_rank(h_BSD).requires_grad_()
    # The oracle's loss is a mean over all sequences, a rank's one over its own.
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0 / parallel_state.get_data_parallel_world_size()))
    out_SBD = layer._forward_mlp(h_SBD)
    out_SBD.backward(_of_rank(grad_BSD))
    found = {"h'": out_SBD.detach(), "h": h_SBD.grad} | _summed_gradients(layer)
    whole = {name: local_part(layer, name, truth[name]) for name in truth if name not in ("h", "h'")}
    return errors(found, {"h'": _of_rank(truth["h'"]), "h": _of_rank(truth["h"])} | whole)


def _of_rank(whole_BSD: torch.Tensor) -> torch.Tensor:
    """This rank's sequences, and with sequence parallelism its places in them; [S, B, D]."""
    dp, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    tp, place = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    return whole_BSD.detach().chunk(dp, 0)[rank].chunk(tp, 1)[place].transpose(0, 1).contiguous()


@torch.no_grad()
def _send_all_to_expert_0(oracle: torch.nn.Module, h_BSD: torch.Tensor) -> None:
    h_BSD[..., 0] = 8.0
    oracle.w2[:, 0] = 0.0
    oracle.shared_w2[0] = 0.0
    for weight_ND in oracle.router_weights:
        weight_ND.mul_(1e-3)[0, 0] = 1.0


def _summed_gradients(layer: TransformerLayer) -> dict[str, torch.Tensor]:
    """Gradients as whoever reduces them makes them whole.

    What all ranks hold (routers, norms) is summed over all; shared experts over data-parallel ranks only, since each
    tensor-parallel rank has other rows; routed experts are whole already.
    """
    gradients = {name: gradient(parameter) for name, parameter in parts_of(layer).items()}
    for name, value in gradients.items():
        if name.startswith(("router", "norm")):
            torch.distributed.all_reduce(value)
        elif name.startswith("shared"):
            torch.distributed.all_reduce(value, group=parallel_state.get_data_parallel_group())
    return gradients


def stock_errors(**changes: Any) -> dict[str, float]:
    """Our layer with one iteration against Megatron's own, both with expert parallel size 2."""
    config = make_config(**EXPERT, **changes)
    stock, layer, found = make_stock(config), make_coe(config), []
    copy_from_stock(layer, stock)
    x = torch.randn(SEQUENCE, 3, HIDDEN, generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
    for each in (stock, layer):
        reset_megatron()
        out = each(x)[0]
        out.backward(x.cos())
        gradients = stock_named(stock, gradient) if each is stock else _named_gradients(layer)
        tracked = {f"tracked {name}": value for name, value in tracked_losses().items()}
        found.append({"out": out.detach(), **gradients, **tracked})
    return errors(found[1], found[0])


def _named_gradients(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: gradient(parameter) for name, parameter in layer.named_parameters()}


def all_to_alls(iterations: int) -> tuple[int, int]:
    """How many all-to-alls carry hidden states in one forward pass, and how many in one backward pass."""
    counted, original = [], torch.distributed.all_to_all_single

    def count(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counted.append(input.dim() == 2 and input.shape[1] == HIDDEN)
        return original(output, input, *args, **kwargs)

    torch.distributed.all_to_all_single = count
    try:
        hidden = torch.randn(SEQUENCE, 3, HIDDEN, requires_grad=True)
        out = make_coe(make_config(**EXPERT, **SHARED), iterations=iterations)(hidden)[0]
        forward = sum(counted)
        out.sum().backward()
        return forward, sum(counted) - forward
    finally:
        torch.distributed.all_to_all_single = original


def initial_experts(layout: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(11)
    experts = make_coe(parallel_config(layout), iterations=2).experts
    return experts.weight1.detach(), experts.weight2.detach()


def checkpoint_outputs(folder: Path) -> dict[str, torch.Tensor]:
    """Load what one rank saved, save it again from two, and what this rank's sequences become."""
    config, chain = parallel_config(EXPERT, **SHARED), ChainSettings(2, topology="iteration_norm")
    h_SBD = _of_rank(make_batch(HIDDEN, batch=4)[0])
    layer = load(make_layer(config, chain), folder / "from one rank")
    save(layer, folder / "from two ranks")
    stock = scramble(make_stock_layer(config), seed=5 + torch.distributed.get_rank())
    with torch.no_grad():  # what all ranks hold has to be alike
        for name, parameter in stock.named_parameters():
            if ".local_experts." not in name:
                torch.distributed.broadcast(parameter, 0)
    save(stock, folder / "stock from two ranks")
    with torch.no_grad():
        return {"ours": layer._forward_mlp(h_SBD), "stock": stock._forward_mlp(h_SBD)}


def work_of_a_rank(folder: Path) -> dict[str, Any]:
    """Everything that the tests below want to know from two ranks, layout after layout."""
    found: dict[str, Any] = {}
    for name, layout in (("expert", EXPERT), ("tensor", TENSOR), ("mixed", MIXED)):
        use_layout(layout)
        found["initial", name] = initial_experts(layout)
        for chain in CHAINS if name == "expert" else CHAINS[:3]:
            found[name, "-".join(chain)] = sub_layer_errors(layout, chain_of(chain, 2))
        found[name, "crowd"] = sub_layer_errors(layout, ChainSettings(2), crowd=True, moe_router_topk=1)
        for router, changes in ROUTERS.items():
            chain = ChainSettings(3, balance="mean" if router == "mean" else "sum")
            found[name, router] = sub_layer_errors(layout, chain, **changes)
    use_layout(EXPERT)
    found["stock"] = {name: stock_errors(**changes) for name, changes in STOCK.items()}
    found["all-to-alls"] = {iterations: all_to_alls(iterations) for iterations in (1, 2, 3)}
    found["checkpoints"] = checkpoint_outputs(folder)
    found["experts"] = make_coe(make_config(**EXPERT), iterations=2).experts.weight1.shape[0]
    return found


@pytest.fixture(scope="module")
def folder(single_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a checkpoint that one rank saved."""
    folder = tmp_path_factory.mktemp("checkpoints")
    layer = make_layer(make_config(**SHARED), ChainSettings(2, topology="iteration_norm"))
    save(scramble(layer, seed=5), folder / "from one rank")
    return folder


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(work_of_a_rank, 2, folder, **EXPERT)


pytestmark = pytest.mark.ranks
NAMES = [*("-".join(chain) for chain in CHAINS), "crowd", *ROUTERS]


@pytest.mark.parametrize("name", NAMES)
def test_expert_parallel_layer_equals_oracle(two_ranks: list[dict], name: str) -> None:
    for found in two_ranks:
        assert max(found["expert", name].values()) <= TOLERANCE, found["expert", name]


@pytest.mark.parametrize("layout", ["tensor", "mixed"])
@pytest.mark.parametrize("name", [*("-".join(chain) for chain in CHAINS[:3]), "crowd", *ROUTERS])
def test_tensor_parallel_layer_equals_oracle(two_ranks: list[dict], layout: str, name: str) -> None:
    for found in two_ranks:
        assert max(found[layout, name].values()) <= TOLERANCE, found[layout, name]


@pytest.mark.parametrize("name", STOCK)
def test_expert_parallel_layer_equals_stock_layer(two_ranks: list[dict], name: str) -> None:
    for found in two_ranks:
        assert max(found["stock"][name].values()) <= 1e-6, found["stock"][name]


def test_every_iteration_sends_tokens_there_and_back(two_ranks: list[dict]) -> None:
    for found in two_ranks:
        assert found["all-to-alls"] == {c: (2 * c, 2 * c) for c in (1, 2, 3)}


def test_each_rank_holds_its_part_of_the_experts(two_ranks: list[dict]) -> None:
    assert [found["experts"] for found in two_ranks] == [EXPERTS // 2] * 2


def test_initial_experts_do_not_depend_on_the_layout(two_ranks: list[dict], single_rank: None) -> None:
    def joined(layout: str, weight: int, dim: int) -> torch.Tensor:
        return torch.cat([found["initial", layout][weight] for found in two_ranks], dim)

    whole1, whole2 = initial_experts({})
    for layout in ("expert", "mixed"):
        assert torch.equal(joined(layout, 0, dim=0), whole1)
        assert torch.equal(joined(layout, 1, dim=0), whole2)
    both = joined("tensor", 0, dim=1)  # gate and value of one rank, then of the other
    gate, value, other_gate, other_value = both.chunk(4, 1)
    assert torch.equal(torch.cat([gate, other_gate, value, other_value], 1), whole1)
    assert torch.equal(joined("tensor", 1, dim=2), whole2)


def test_checkpoints_move_between_numbers_of_ranks(two_ranks: list[dict], folder: Path) -> None:
    """One rank -> two -> one, and Megatron's layer on two ranks -> ours on one."""
    h_BSD, _ = make_batch(HIDDEN, batch=4)
    chain = ChainSettings(2, topology="iteration_norm")
    for name, source, settings in (
        ("ours", "from one rank", chain),
        ("ours", "from two ranks", chain),
        ("stock", "stock from two ranks", ChainSettings(1)),
    ):
        layer = load(make_layer(make_config(**SHARED), settings), folder / source)
        by_two = torch.cat([found["checkpoints"][name] for found in two_ranks], 1).transpose(0, 1)
        torch.testing.assert_close(sub_layer(layer, h_BSD), by_two, rtol=1e-5, atol=1e-6)
