"""Core attention over torch's kernel against Megatron's, and the norm that goes with it."""

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from model_build import HIDDEN, errors, make_config, relative_error

from coe_megatron.local_backend.attention import SDPACoreAttention
from coe_megatron.local_backend.norm import Norm

S, B, A, H = 7, 2, 4, 8
CAUSAL = torch.ones(S, S, dtype=torch.bool).triu(1)[None, None]  # True where attention is forbidden


def make_core(kind: type, mask_type: AttnMaskType = AttnMaskType.causal, **more: Any) -> torch.nn.Module:
    extra = {name: more.pop(name) for name in ("softmax_scale", "k_channels", "v_channels") if name in more}
    config = make_config(num_attention_heads=A, hidden_size=A * H, masked_softmax_fusion=False, **more)
    return kind(config, 1, mask_type, "self", **extra)


def make_qkv(groups: int = A, value_size: int = H, requires_grad: bool = True) -> list[torch.Tensor]:
    sizes = ((A, H), (groups, H), (groups, value_size))
    return [torch.randn(S, B, *size, requires_grad=requires_grad) for size in sizes]


def attend(core: torch.nn.Module, qkv: list[torch.Tensor], mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    qkv = [x.detach().clone().requires_grad_() for x in qkv]
    out = core(*qkv, mask)
    out.backward(torch.cos(torch.arange(out.numel())).view_as(out))
    return {"out": out.detach(), **dict(zip("qkv", (x.grad for x in qkv), strict=True))}


@pytest.mark.parametrize("groups", [A, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_equals_dot_product_attention(groups: int, scale: float | None) -> None:
    ours, theirs = (
        make_core(kind, num_query_groups=groups, softmax_scale=scale)
        for kind in (SDPACoreAttention, DotProductAttention)
    )
    qkv = make_qkv(groups)
    truth = attend(theirs, qkv, CAUSAL)
    for mask in (CAUSAL, None):  # without a mask the mask type decides
        found = attend(ours, qkv, mask)
        assert max(errors(found, truth).values()) < 1e-5, errors(found, truth)


def test_a_given_mask_stands_alone() -> None:
    """As in Megatron's core: a mask that lets every place see every other one switches causality off."""
    ours, theirs = make_core(SDPACoreAttention), make_core(DotProductAttention)
    qkv, mask = make_qkv(), torch.zeros(B, 1, S, S, dtype=torch.bool)
    mask[1, ..., 4:] = True
    assert max(errors(attend(ours, qkv, mask), attend(theirs, qkv, mask)).values()) < 1e-5


def test_no_mask_type_means_no_mask() -> None:
    qkv = make_qkv()
    everything = torch.zeros(1, 1, S, S, dtype=torch.bool)
    found = attend(make_core(SDPACoreAttention, AttnMaskType.no_mask), qkv, None)
    assert max(errors(found, attend(make_core(DotProductAttention), qkv, everything)).values()) < 1e-5


def test_values_may_have_a_size_of_their_own() -> None:
    """As in multi-latent attention; the same as with values filled up with zeros."""
    query, key, value = make_qkv(value_size=6, requires_grad=False)
    out = make_core(SDPACoreAttention, k_channels=H, v_channels=6)(query, key, value, None)
    filled = torch.nn.functional.pad(value, (0, H - 6))
    whole = make_core(SDPACoreAttention)(query, key, filled, None).view(S, B, A, H)
    assert out.shape == (S, B, A * 6)
    assert relative_error(out, whole[..., :6].flatten(2)) < 1e-6


def test_dropout_draws_from_the_model_parallel_generator() -> None:
    core = make_core(SDPACoreAttention, attention_dropout=0.5)
    qkv = make_qkv(requires_grad=False)
    tracker, before = get_cuda_rng_tracker().get_states()["model-parallel-rng"].clone(), torch.get_rng_state()
    first, second = core(*qkv, None), core(*qkv, None)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(get_cuda_rng_tracker().get_states()["model-parallel-rng"], tracker)
    assert not torch.equal(first, second)
    assert torch.equal(core.eval()(*qkv, None), core(*qkv, None))


def test_dropout_within_the_block_of_sequence_parallelism_moves_its_generator_on() -> None:
    """There Megatron's block has forked already; a fork inside would give every pass the same mask."""
    core = make_core(SDPACoreAttention, attention_dropout=0.5)
    core.config.sequence_parallel = True  # Megatron's config wants several tensor-parallel ranks for it
    qkv, found = make_qkv(requires_grad=False), []
    for _ in range(2):
        with get_cuda_rng_tracker().fork():
            found.append(core(*qkv, None))
    assert not torch.equal(*found)


def test_attention_without_gradients_stays_without() -> None:
    with torch.no_grad():
        assert not make_core(SDPACoreAttention)(*make_qkv(), None).requires_grad


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_marks_its_gain_for_sequence_parallelism(kind: str, sequence_parallel: bool) -> None:
    config = make_config(normalization=kind)
    config.sequence_parallel = sequence_parallel  # Megatron's config wants several tensor-parallel ranks for it
    norm = Norm(config=config, hidden_size=HIDDEN, eps=1e-6)
    parameters = dict(norm.named_parameters())
    assert list(parameters) == (["weight"] if kind == "RMSNorm" else ["weight", "bias"])
    assert all(p.sequence_parallel is sequence_parallel for p in parameters.values())
    x = torch.randn(3, HIDDEN)
    centred = x - x.mean(1, keepdim=True) if kind == "LayerNorm" else x
    truth = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), truth)
