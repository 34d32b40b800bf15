"""The layer on two ranks, with expert and with tensor parallelism, against the oracle, Megatron's layer and itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.transformer.transformer_layer import TransformerLayer
from model_build import (
    EXPERTS,
    HIDDEN,
    LOSSES,
    SEQUENCE,
    TOPK,
    Named,
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
    relative_error,
    reset_megatron,
    stock_named,
    tracked_losses,
)
from model_checkpoint import load, make_stock_layer, save, scramble, sub_layer
from model_oracle import CHAINS, ITERATIONS, STREAMS, VARIANTS, chain_of, make_batch, oracle_step
from ranks import run_ranks

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.model.router_state import update_router_state

TOLERANCE = 1e-5  # relative to the largest entry, fp32
SHARED = {"moe_shared_expert_intermediate_size": 40}
EXPERT = {"expert_model_parallel_size": 2}
TENSOR = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
WAYS: dict[str, dict[str, Any]] = {  # of streams in a latent space
    "latent, deduplicated": {"deduplicated": True},
    "latent, allgather": {"moe_token_dispatcher_type": "allgather"},
    "latent, chunks, deduplicated, recompute": {"deduplicated": True, "overlap_chunks": 2, "recompute": "layer"},
    "latent, chunks, recompute iterations": {"overlap_chunks": 2, "recompute": "iteration"},
}
MIXED = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
ROUTERS: dict[str, dict[str, Any]] = {
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "mean": {},
    "recompute": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "recompute experts": {"recompute": "experts"},
    "recompute iterations": {"recompute": "iteration"},
    "deduplicated": {"deduplicated": True},
    "deduplicated, recompute": {"deduplicated": True, "recompute": "layer"},
    "deduplicated, recompute experts": {"deduplicated": True, "recompute": "experts"},
    "deduplicated, all of N": {"deduplicated": True, "moe_router_topk": EXPERTS},
    "chunks": {"overlap_chunks": 2},
    "chunks, recompute": {"overlap_chunks": 2, "recompute": "layer"},
    "chunks, recompute iterations": {"overlap_chunks": 3, "recompute": "iteration"},
    "chunks, deduplicated": {"overlap_chunks": 2, "deduplicated": True},
    "chunks, deduplicated, recompute iterations": {"overlap_chunks": 2, "deduplicated": True, "recompute": "iteration"},
    "chunks, deduplicated, recompute experts": {"overlap_chunks": 3, "deduplicated": True, "recompute": "experts"},
    "sigmoid": {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False},
    "all of N": {"moe_router_topk": EXPERTS},
}
CROWDS: dict[str, dict[str, Any]] = {
    "crowd": {},
    "crowd, deduplicated": {"deduplicated": True},
    "crowd, chunks": {"deduplicated": True, "overlap_chunks": 2},
}
STOCK: dict[str, dict[str, Any]] = {
    "losses": {**LOSSES, "moe_shared_expert_intermediate_size": 40},
    "aux_loss": {**LOSSES, "moe_router_load_balancing_type": "aux_loss"},
    "global_aux_loss": {**LOSSES, "moe_router_load_balancing_type": "global_aux_loss"},
    "allgather": {**LOSSES, "moe_token_dispatcher_type": "allgather"},
    "capacity": {"moe_expert_capacity_factor": 0.7},
    "capacity, padded": {"moe_expert_capacity_factor": 0.7, "moe_pad_expert_input_to_capacity": True},
}
# Every chain, and every number of iterations with three of them; on one rank all go with all.
CASES = [*((chain, 2) for chain in CHAINS), *((chain, c) for chain in CHAINS[::12] for c in ITERATIONS if c != 2)]
GATINGS = ("independent", "shared_router", "fixed")
BIAS = {
    "moe_router_score_function": "sigmoid",
    "moe_router_pre_softmax": False,
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.5,
}
JITTER = {"moe_input_jitter_eps": 0.2}
GLOBAL = {"moe_router_load_balancing_type": "global_aux_loss", "moe_z_loss_coeff": None}  # z-loss is a rank's own
CHUNKS = {"overlap_chunks": 2}
CAPACITY = {"moe_router_load_balancing_type": "aux_loss", "moe_expert_capacity_factor": 0.7}
PADDED = {**CAPACITY, "moe_pad_expert_input_to_capacity": True}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "expert bias": BIAS,
    "jitter": JITTER,
    "groups": {"moe_router_num_groups": 4, "moe_router_group_topk": 1},
    "replay": {"moe_enable_routing_replay": True},
    "padding": {},
    "padding, expert bias": BIAS,
    "padding, global_aux_loss": GLOBAL,
    "global_aux_loss": GLOBAL,
    "capacity, by probability": {**CAPACITY, "moe_token_drop_policy": "probs"},
    "capacity, by position": {**CAPACITY, "moe_token_drop_policy": "position"},
    "capacity, by probability, padded": {**PADDED, "moe_token_drop_policy": "probs"},
    "capacity, by position, padded": {**PADDED, "moe_token_drop_policy": "position"},
    "capacity, allgather": {**CAPACITY, **ROUTERS["allgather"]},
    "padding, capacity by probability": {**CAPACITY, "moe_token_drop_policy": "probs"},
    "padding, capacity by position": {**CAPACITY, "moe_token_drop_policy": "position"},
    "padding, capacity, padded": {**PADDED, **BIAS},
    "padding, capacity, allgather": {**CAPACITY, **ROUTERS["allgather"]},
    "padding, capacity, recompute iterations": {**PADDED, **ROUTERS["recompute iterations"]},
    "allgather": ROUTERS["allgather"],
    "recompute": ROUTERS["recompute"],
    "recompute, jitter, expert bias": {**ROUTERS["recompute"], **JITTER, **BIAS},
    "recompute iterations, jitter, expert bias": {**ROUTERS["recompute iterations"], **JITTER, **BIAS},
    "capacity, recompute iterations": {**ROUTERS["recompute iterations"], **CAPACITY},
    "recompute iterations, global_aux_loss": {**ROUTERS["recompute iterations"], **GLOBAL},
    "deduplicated": {"deduplicated": True},
    "padding, deduplicated": {"deduplicated": True, **BIAS},
    "chunks": CHUNKS,
    "chunks, expert bias": {**CHUNKS, **BIAS},
    "chunks, groups": {**CHUNKS, "moe_router_num_groups": 4, "moe_router_group_topk": 1},
    "chunks, global_aux_loss": {**CHUNKS, **GLOBAL},
    "padding, chunks": {**CHUNKS, **BIAS},
    "padding, chunks, deduplicated": {**CHUNKS, "deduplicated": True},
    "chunks, recompute iterations, global_aux_loss": {**CHUNKS, **ROUTERS["recompute iterations"], **GLOBAL},
    "chunks, recompute, expert bias": {**CHUNKS, **ROUTERS["recompute"], **BIAS},
    "replay, recompute iterations": {**ROUTERS["recompute iterations"], "moe_enable_routing_replay": True},
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


def taken(changes: dict[str, Any]) -> dict[str, Any]:
    """What is an argument of the spec and not Megatron's, taken out of `changes`."""
    return {name: changes.pop(name) for name in ("recompute", "deduplicated", "overlap_chunks") if name in changes}


def sub_layer_errors(
    layout: dict[str, int], chain: ChainSettings, crowd: bool = False, **changes: Any
) -> dict[str, float]:
    """How far this rank's part of h', of the input's gradient and of each parameter's gradient is from the oracle's.

    Data-parallel ranks hold different sequences, tensor-parallel ranks different places of all sequences.
    """
    own = taken(changes)
    config = parallel_config(layout, **LOSSES, **SHARED, **changes)
    torch.manual_seed(2)
    oracle, layer = make_oracle(config, chain), make_layer(config, chain, **own)
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

    What all ranks hold (routers, norms, variants) is summed over all; shared experts over data-parallel ranks only,
    since each tensor-parallel rank has other rows; routed experts are whole already.
    """
    gradients = {name: gradient(parameter) for name, parameter in parts_of(layer).items()}
    for name, value in gradients.items():
        if name.startswith(("router", "norm", "variants")):
            torch.distributed.all_reduce(value)
        elif name.startswith("shared"):
            torch.distributed.all_reduce(value, group=parallel_state.get_data_parallel_group())
    return gradients


def stock_errors(**changes: Any) -> dict[str, float]:
    """Our layer with one iteration against Megatron's own, both with expert parallel size 2."""
    config = make_config(**EXPERT, **changes)
    stock, layer, found = make_stock(config), make_coe(config, megatron_losses=True), []
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


def feature_rounds(name: str, gating: str, layout: dict[str, int]) -> Named:
    """Two rounds over the same sequences: this rank's half of them, or both halves one after the other on one rank.

    Between the rounds expert biases move, where there are any, and the routers' weights change their sign; the second
    round replays the first one's routes where that is on. What is alike on all ranks or added up over them is returned
    so; outputs, the input's gradient and those of routed experts are this rank's.
    """
    reset_megatron()
    changes = {**LOSSES, **SHARED, **FEATURES[name]}
    own = taken(changes)
    config, chain = make_config(**layout, **changes), ChainSettings(2, gating)
    torch.manual_seed(2)
    # Gradients are summed here, not averaged, so a global loss must not be multiplied by the replicas.
    oracle, layer = make_oracle(config, chain), make_layer(config, chain, megatron_losses=True, **own)
    copy_from_oracle(layer, oracle)
    counts: list[torch.Tensor] = []
    recorded: dict[int, list[torch.Tensor]] = {}
    first = _feature_round(name, layer, RouterReplayAction.RECORD, recorded)
    if config.moe_router_enable_expert_bias:
        counts = [router.local_tokens_per_expert.clone() for router in layer.mlp.routers]
    update_router_state(layer)
    with torch.no_grad():
        for weight in (part for part_name, part in parts_of(layer).items() if part_name.startswith("router")):
            weight.neg_()
    second = _feature_round(name, layer, RouterReplayAction.REPLAY_FORWARD, recorded)
    found = {f"{key} in round {i}": value for i, values in ((1, first), (2, second)) for key, value in values.items()}
    for t, router in enumerate(layer.mlp.routers):
        for loss, value in router.stats.losses.items():
            # A global loss is noted as if each rank had seen what it did, so that a mean over ranks is the loss.
            seen = torch.distributed.get_world_size() if loss.startswith("global") else 1
            torch.distributed.all_reduce(found.setdefault(f"{loss} {t}", value / seen))
        if config.moe_router_enable_expert_bias:
            torch.distributed.all_reduce(found.setdefault(f"counts {t}", counts[t]))
            found[f"bias {t}"] = router.expert_bias.clone()
    return found | _summed_gradients(layer)


def _feature_round(
    name: str, layer: TransformerLayer, action: RouterReplayAction, recorded: dict[int, list[torch.Tensor]]
) -> Named:
    h_BSD, grad_BSD = make_batch(HIDDEN, batch=4)
    padding_BS = torch.zeros(h_BSD.shape[:2], dtype=torch.bool)
    padding_BS[1, 4:] = padding_BS[3, 1:] = True  # not the same number in each half
    for router in layer.mlp.routers:
        router.stats.load = None
    found = []
    for half in _micro_batches(name):
        torch.manual_seed(half.start)  # of the jitter
        h_SBD = h_BSD[half].transpose(0, 1).contiguous().requires_grad_()
        if action == RouterReplayAction.REPLAY_FORWARD:
            RouterReplay.set_replay_data(recorded[half.start])
        RouterReplay.set_global_router_replay_action(action)
        padding = padding_BS[half] if name.startswith("padding") else None
        out_SBD = layer._forward_mlp(h_SBD, padding_mask=padding)
        recorded.setdefault(half.start, RouterReplay.get_recorded_data())
        out_SBD.backward(grad_BSD[half].transpose(0, 1))
        found.append((out_SBD.detach(), h_SBD.grad))
    loads = {f"load {t}": router.stats.load for t, router in enumerate(layer.mlp.routers)}
    for load_N in loads.values():
        torch.distributed.all_reduce(load_N)
    outs, gradients = zip(*found, strict=True)
    return {"h'": torch.cat(outs, 1), "h": torch.cat(gradients, 1), **loads}


def _micro_batches(name: str) -> list[slice]:
    """Which of the four sequences this rank takes at a time."""
    halves = [slice(0, 2), slice(2, 4)]
    if torch.distributed.get_world_size() == 2:
        return [halves[torch.distributed.get_rank()]]
    return [slice(0, 4)] if "global" in name else halves  # a global loss looks at all ranks' tokens at once


def all_to_alls(iterations: int, latent: int | None = None) -> tuple[int, int]:
    """How many all-to-alls carry hidden or latent states in one forward pass, and how many in one backward pass."""
    counted, original = [], torch.distributed.all_to_all_single

    def count(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counted.append(input.dim() == 2 and input.shape[1] == (latent or HIDDEN))
        return original(output, input, *args, **kwargs)

    torch.distributed.all_to_all_single = count
    try:
        hidden = torch.randn(SEQUENCE, 3, HIDDEN, requires_grad=True)
        out = make_coe(make_config(**EXPERT, **SHARED), iterations=iterations, latent=latent)(hidden)[0]
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
    config, chain = parallel_config(EXPERT, **SHARED), ChainSettings(2, norm_placement="iteration_norm")
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
        for chain, iterations in CASES if name == "expert" else [(chain, 2) for chain in CHAINS[:3]]:
            found[name, _name(chain, iterations)] = sub_layer_errors(layout, chain_of(chain, iterations))
        for crowd, changes in CROWDS.items():
            found[name, crowd] = sub_layer_errors(layout, ChainSettings(2), crowd=True, moe_router_topk=1, **changes)
        for router, changes in ROUTERS.items():
            chain = ChainSettings(3, aux_loss_reduction="mean" if router == "mean" else "sum")
            found[name, router] = sub_layer_errors(layout, chain, **changes)
        for variant, settings in (VARIANTS | STREAMS).items():
            found[name, variant] = sub_layer_errors(layout, ChainSettings(**{"iterations": 3, **settings}))
        for way, changes in WAYS.items():
            chain = ChainSettings(3, **STREAMS["streams, latent, modulation"])
            found[name, way] = sub_layer_errors(layout, chain, **changes)
    use_layout(EXPERT)
    for gating in GATINGS:
        for name in FEATURES:
            found[name, gating] = feature_rounds(name, gating, EXPERT)
    found["stock"] = {name: stock_errors(**changes) for name, changes in STOCK.items()}
    found["all-to-alls"] = {iterations: all_to_alls(iterations) for iterations in (1, 2, 3)}
    found["latent all-to-alls"] = all_to_alls(2, latent=8)
    found["checkpoints"] = checkpoint_outputs(folder)
    found["experts"] = make_coe(make_config(**EXPERT), iterations=2).experts.weight1.shape[0]
    return found


@pytest.fixture(scope="module")
def folder(megatron_groups: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a checkpoint that one rank saved."""
    folder = tmp_path_factory.mktemp("checkpoints")
    layer = make_layer(make_config(**SHARED), ChainSettings(2, norm_placement="iteration_norm"))
    save(scramble(layer, seed=5), folder / "from one rank")
    return folder


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(work_of_a_rank, 2, folder, **EXPERT)


def _name(chain: tuple[str, str, str], iterations: int) -> str:
    return f"{'-'.join(chain)}-{iterations}"


pytestmark = pytest.mark.ranks
NAMES = [
    *(_name(chain, iterations) for chain, iterations in CASES),
    *CROWDS,
    *ROUTERS,
    *VARIANTS,
    *STREAMS,
]


@pytest.mark.parametrize("name", NAMES)
def test_expert_parallel_layer_equals_oracle(two_ranks: list[dict], name: str) -> None:
    for found in two_ranks:
        assert max(found["expert", name].values()) <= TOLERANCE, found["expert", name]


@pytest.mark.parametrize("layout", ["tensor", "mixed"])
@pytest.mark.parametrize(
    "name", [*(_name(chain, 2) for chain in CHAINS[:3]), *CROWDS, *ROUTERS, *VARIANTS, *STREAMS, *WAYS]
)
def test_tensor_parallel_layer_equals_oracle(two_ranks: list[dict], layout: str, name: str) -> None:
    for found in two_ranks:
        assert max(found[layout, name].values()) <= TOLERANCE, found[layout, name]


@pytest.mark.parametrize("name", STOCK)
def test_expert_parallel_layer_equals_stock_layer(two_ranks: list[dict], name: str) -> None:
    for found in two_ranks:
        assert max(found["stock"][name].values()) <= 1e-6, found["stock"][name]


@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("name", FEATURES)
def test_features_do_the_same_on_two_ranks_as_on_one(
    two_ranks: list[dict], single_rank: None, name: str, gating: str
) -> None:
    truth = feature_rounds(name, gating, {})
    _assert_that_it_shows(name, gating, truth)
    for rank, ranks_found in enumerate(two_ranks):
        found = errors(ranks_found[name, gating], {key: _part_of_rank(key, truth[key], rank) for key in truth})
        assert max(found.values()) <= TOLERANCE, found


def _part_of_rank(key: str, whole: torch.Tensor, rank: int) -> torch.Tensor:
    """Of sequences and of routed experts a rank has its half."""
    if key in ("w1", "w2"):
        return whole.chunk(2, 0)[rank]
    return whole.chunk(2, 1)[rank] if key.startswith("h") else whole


def _assert_that_it_shows(name: str, gating: str, found: Named) -> None:
    """On one rank: a feature without effect would be the same on two for no merit of its own."""
    iterations = 1 if gating == "fixed" else 2
    first, second = ([found[f"load {t} in round {i}"] for t in range(iterations)] for i in (1, 2))
    places = 4 * SEQUENCE - (7 if name.startswith("padding") else 0)
    for load_N in first + second:
        total = float(load_N.sum())
        if "capacity" in name:
            # Of each half 12 tokens x 2 choices / 8 experts x 0.7, rounded up, or with padding 10 and 7 tokens.
            assert float(load_N.max()) == (2 + 2 if name.startswith("padding") else 3 + 3)
            assert total < places * TOPK
        else:
            assert total == places * TOPK
    assert all(map(torch.equal, first, second)) == name.startswith("replay")
    if "bias 0" in found:
        for t, load_N in enumerate(first):
            assert torch.equal(found[f"counts {t}"], load_N)
            torch.testing.assert_close(found[f"bias {t}"], 0.5 * torch.sign(load_N.mean() - load_N).float())
    assert ("global_load_balancing_loss 0" in found) == ("global" in name)
    if name in ("jitter", "groups"):
        plain = feature_rounds("plain", gating, {})
        assert relative_error(found["h' in round 1"], plain["h' in round 1"]) > 0.01


def test_every_iteration_sends_tokens_there_and_back(two_ranks: list[dict]) -> None:
    for found in two_ranks:
        assert found["all-to-alls"] == {c: (2 * c, 2 * c) for c in (1, 2, 3)}
        assert found["latent all-to-alls"] == (4, 4)


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
    chain = ChainSettings(2, norm_placement="iteration_norm")
    for name, source, settings in (
        ("ours", "from one rank", chain),
        ("ours", "from two ranks", chain),
        ("stock", "stock from two ranks", ChainSettings(1)),
    ):
        layer = load(make_layer(make_config(**SHARED), settings), folder / source)
        by_two = torch.cat([found["checkpoints"][name] for found in two_ranks], 1).transpose(0, 1)
        torch.testing.assert_close(sub_layer(layer, h_BSD), by_two, rtol=1e-5, atol=1e-6)
