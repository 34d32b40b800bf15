"""Gradients that are silently wrong in Megatron-Core where parallelisms combine (issue 7452 of NVIDIA/Megatron-LM).

Each case is a small run on CPUs of Megatron's layer and of ours with one iteration, beside each other: what two ranks
come to, over what one process comes to. Ours has to be 1; Megatron's is what the installed release has, so that a
mended one is noticed. `docs/megatron-releases.md` has the table.
"""

from functools import cache
from importlib.metadata import version
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from model_build import BATCH, HIDDEN, copy_from_stock, make_coe, make_config, make_gpt, make_stock, reset_megatron
from ranks import run_ranks

from coe_megatron.local_backend.attention import SDPACoreAttention

OLD = version("megatron-core").startswith("0.16")
LENGTH = 8
KINDS = ("seq_aux_loss", "aux_loss", "global_aux_loss", "z")
DENSE = {"num_moe_experts": None, "moe_ffn_hidden_size": None}
PER_TOKEN = {"calculate_per_token_loss": True}
CASES = ("per micro-batch", "per token", "per token, padding")


def megatrons(case: str, kind: str) -> float:
    """Megatron's gradient on two tensor-parallel ranks, in the right one's.

    0.16.1 counts a rank's tokens, and for the sequence loss those of one row; 0.19.2 multiplies by the ranks. With
    padding both take the tokens of all ranks for a rank's, since an all-reduce changes the counts in place.
    """
    if case == "per micro-batch":
        return 1.0
    in_place = 2.0 if "padding" in case and kind != "z" else 1.0
    if not OLD:
        return in_place
    return in_place / 2 / (BATCH if kind == "seq_aux_loss" else 1)


def loss_config(kind: str, **more: Any) -> Any:
    """One auxiliary loss alone."""
    balancing = {"moe_router_load_balancing_type": "none", "moe_z_loss_coeff": 0.1}
    if kind != "z":
        balancing = {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 0.1}
    return make_config(**balancing, **more)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [S, B, D], and a padding mask [B, S] with as much padding in both halves of the sequence."""
    states = torch.randn(LENGTH, BATCH, HIDDEN, generator=torch.Generator().manual_seed(3))
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, 3], padding[1, 7], padding[2, 2:4], padding[2, 6:] = True, True, True, True
    return states, padding


def auxiliary_gradients(case: str, kind: str) -> dict[str, torch.Tensor]:
    """Of the router's weight, from the auxiliary loss alone, as the optimizer would get it; stock's and ours."""
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    layout = {"tensor_model_parallel_size": tensor, "sequence_parallel": tensor > 1, "expert_tensor_parallel_size": 1}
    torch.manual_seed(1)
    config = loss_config(kind, **layout, **(PER_TOKEN if "per token" in case else {}))
    stock, ours = make_stock(config), make_coe(config)
    copy_from_stock(ours, stock)
    states, padding = batch()
    part = slice(rank * LENGTH // tensor, (rank + 1) * LENGTH // tensor)
    mask = padding[:, part] if "padding" in case else None
    tokens = (~padding).sum() if "padding" in case else torch.tensor(padding.numel())
    found = {}
    for name, layer in {"stock": stock, "ours": ours}.items():
        reset_megatron()
        out, _ = layer(states[part], padding_mask=mask)
        out.backward(torch.zeros_like(out))
        gradient = layer.router.weight.grad
        torch.distributed.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
        found[name] = gradient / (tokens if "per token" in case else 1)  # as Megatron's finalisation does
    return found


def all_auxiliary_gradients() -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    return {(case, kind): auxiliary_gradients(case, kind) for case in CASES for kind in KINDS}


@cache
def ratios() -> dict[tuple[str, str], dict[str, float]]:
    """By case, loss and layer: the gradient on two ranks over that of our layer in one process."""
    (alone,), (two, _) = (
        run_ranks(all_auxiliary_gradients, ranks, tensor_model_parallel_size=ranks, expert_tensor_parallel_size=1)
        for ranks in (1, 2)
    )
    return {
        place: {
            name: float((gradient * alone[place]["ours"]).sum() / alone[place]["ours"].square().sum())
            for name, gradient in found.items()
        }
        for place, found in two.items()
    }


@pytest.mark.ranks
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_auxiliary_gradients_with_tensor_parallelism(case: str, kind: str) -> None:
    found = ratios()[case, kind]
    assert found["ours"] == pytest.approx(1, abs=1e-4)
    assert found["stock"] == pytest.approx(megatrons(case, kind), abs=1e-4)


def global_gradients() -> dict[str, torch.Tensor]:
    """Of the router's weight from the global loss, the mean over replicas, each of which has some of the rows."""
    torch.manual_seed(1)
    config = loss_config("global_aux_loss")
    stock, ours = make_stock(config), make_coe(config)
    copy_from_stock(ours, stock)
    group = parallel_state.get_data_parallel_group()
    states = torch.randn(LENGTH, 2 * BATCH, HIDDEN, generator=torch.Generator().manual_seed(3))
    found = {}
    for name, layer in {"stock": stock, "ours": ours}.items():
        reset_megatron()
        out, _ = layer(states.chunk(group.size(), dim=1)[group.rank()].contiguous())
        out.backward(torch.zeros_like(out))
        gradient = layer.router.weight.grad
        torch.distributed.all_reduce(gradient, group=group)
        found[name] = gradient / group.size()
    return found


@pytest.mark.ranks
def test_the_global_loss_does_not_fade_with_replicas() -> None:
    (alone,), (two, _) = run_ranks(global_gradients, 1), run_ranks(global_gradients, 2)
    torch.testing.assert_close(two["ours"], alone["ours"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(two["stock"], alone["stock"] / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("single_rank")
def test_the_expert_bias_counts_no_padding() -> None:
    """Megatron multiplies choices [T, N] by a mask that lies across them: it counts other tokens, or fails."""
    config = make_config(
        moe_router_score_function="sigmoid", moe_router_pre_softmax=False, moe_router_enable_expert_bias=True
    )
    stock, ours = make_stock(config), make_coe(config)
    copy_from_stock(ours, stock)
    states, padding = batch()
    chosen = {}
    for name, layer in {"stock": stock, "ours": ours}.items():
        reset_megatron()
        try:
            layer(states, padding_mask=padding)
        except RuntimeError:
            chosen[name] = None
        else:
            chosen[name] = layer.router.local_tokens_per_expert.clone()
    assert chosen["ours"] is not None and chosen["ours"].sum() == (~padding).sum() * config.moe_router_topk
    assert chosen["stock"] is None or not torch.equal(chosen["stock"], chosen["ours"])


def vocabulary_losses() -> dict[bool, torch.Tensor]:
    """The losses of a model with divided logits, and with logits that are gathered before the loss."""
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    found = {}
    for divided in (True, False):
        torch.manual_seed(1)
        config = make_config(tensor_model_parallel_size=tensor, **DENSE)
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        spec.submodules.self_attention.submodules.core_attention = SDPACoreAttention
        model = make_gpt(config, spec, parallel_output=divided)
        for parameter in model.parameters():  # equal logits on any layout
            torch.nn.init.constant_(parameter, 0.01)
        tokens = torch.arange(LENGTH).expand(BATCH, -1)
        found[divided] = model(tokens, tokens, None, labels=tokens).detach()
    return found


@pytest.mark.ranks
def test_the_loss_of_gathered_logits_counts_the_vocabulary_once_for_each_rank() -> None:
    """Our programs never gather them; `GPTModel(parallel_output=False)` in a program of a user does."""
    (alone,), (two, _) = (run_ranks(vocabulary_losses, ranks, tensor_model_parallel_size=ranks) for ranks in (1, 2))
    torch.testing.assert_close(two[True], alone[True])
    torch.testing.assert_close(two[False], alone[False] + torch.tensor(2.0).log())
