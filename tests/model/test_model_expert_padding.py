"""Experts whose rows are padded, as in bf16 on a CPU with AMX: the results of those without, in few sizes."""

import platform
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coe_megatron.local_backend import expert_mlp
from coe_megatron.local_backend.expert_activation import OtherActivation, SwiGLU
from coe_megatron.local_backend.expert_mlp import Activation, Assignment, ExpertMLP, WeightGradients

TOKENS, SLOTS, HIDDEN, FFN = 24, 4, 16, 8
COUNTS = {
    "ragged": (5, 0, 33, 32, 1),
    "one expert has all": (0, 0, 71, 0, 0),
    "multiples of 32": (32, 64, 0, 0, 0),
    "no rows": (0, 0, 0, 0, 0),
}
# Relative to the largest entry: sums may be taken in another order.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


def make_assignment(counts: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Assignment:
    """Random tokens and rows; the gate of a slot that no row uses is NaN."""
    generator = torch.Generator().manual_seed(seed)
    slots_R = torch.randperm(TOKENS * SLOTS, generator=generator)[: sum(counts)]
    gates = torch.full((TOKENS * SLOTS,), torch.nan).index_fill(0, slots_R, 0.7) + torch.arange(TOKENS * SLOTS) / 200
    tokens = torch.randn(TOKENS, HIDDEN, generator=generator)
    ends_E = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    return Assignment(tokens.to(dtype), gates.view(TOKENS, SLOTS).to(dtype), slots_R, ends_E)


def results(uses: list[Assignment], activation: Activation, keeps_activation: bool) -> dict[str, Tensor]:
    """Outputs of all uses of the same experts, and gradients of everything, by a random gradient of the outputs."""
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator)
    experts, dtype = len(uses[0].ends_E), uses[0].tokens_MD.dtype
    weights = draw(experts, 2 * FFN, HIDDEN), draw(experts, HIDDEN, FFN)
    inputs = [*weights, *(tensor for use in uses for tensor in use[:2])]
    w1, w2, *states = inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    mlp, gradients = ExpertMLP((w1, w2), activation, keeps_activation), WeightGradients(w1, w2)
    outputs = [
        mlp(Assignment(tokens, gates, use.slots_R, use.ends_E), gradients)
        for use, tokens, gates in zip(uses, states[::2], states[1::2], strict=True)
    ]
    found = torch.autograd.grad(outputs, inputs, [draw(TOKENS, HIDDEN).to(dtype) for _ in uses])
    names = ["w1", "w2", *(f"{name} {use}" for use in range(len(uses)) for name in ("tokens", "gates"))]
    return dict(zip(names, found, strict=True)) | {
        f"output {use}": output.detach() for use, output in enumerate(outputs)
    }


def compare(monkeypatch: pytest.MonkeyPatch, uses: list[Assignment], *others: object) -> dict[str, Tensor]:
    """Require the same with and without padding, also NaN and infinities; returns what it is with padding."""
    plain, padded = (pad_and_run(monkeypatch, is_padded, uses, *others) for is_padded in (False, True))
    for name, expected in plain.items():
        finite = expected[expected.isfinite()]
        bound = TOLERANCE[expected.dtype] * float(finite.abs().amax()) if len(finite) else 0
        torch.testing.assert_close(
            padded[name], expected, atol=bound, rtol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )
    return padded


def pad_and_run(monkeypatch: pytest.MonkeyPatch, is_padded: bool, uses: list[Assignment], *others) -> dict[str, Tensor]:
    monkeypatch.setattr(expert_mlp, "needs_padding", lambda tokens_MD: is_padded)
    return results(uses, *others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_outputs_and_all_gradients_are_those_without_padding(
    counts: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for activation, keeps in product((SwiGLU(), OtherActivation(F.gelu, is_gated=True)), (True, False)):
        padded = compare(monkeypatch, [make_assignment(counts, dtype)], activation, keeps)
        assert all(tensor.isfinite().all() for tensor in padded.values())
        without_rows = [expert for expert, rows in enumerate(counts) if not rows]
        assert not padded["w1"][without_rows].any() and not padded["w2"][without_rows].any()


def test_two_iterations_have_the_sum_of_weight_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    uses = [make_assignment(counts, torch.float32, seed) for seed, counts in enumerate(COUNTS.values())]
    compare(monkeypatch, uses[:2], SwiGLU(), True)
    compare(monkeypatch, uses, SwiGLU(), False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_reaches_what_it_reaches_without_padding(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    use = make_assignment(COUNTS["ragged"], torch.float32)
    token = int(use.index_R[0])
    use.tokens_MD[token] = value
    padded = compare(monkeypatch, [use], SwiGLU(), True)
    rest = [other for other in range(TOKENS) if other != token]
    assert padded["w1"][0].isnan().any(), "its own expert has it"
    assert padded["output 0"][rest].isfinite().all() and padded["tokens 0"][rest].isfinite().all()


def test_every_product_has_multiples_of_32_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, right = [], F.grouped_mm

    def grouped_mm(*matrices: Tensor, offs: Tensor) -> Tensor:
        sizes.append(offs.diff(prepend=offs.new_zeros(1)).tolist())
        return right(*matrices, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", grouped_mm)
    uses = [make_assignment(COUNTS[name], torch.float32) for name in ("ragged", "one expert has all")]
    for is_padded in (False, True):
        pad_and_run(monkeypatch, is_padded, uses, SwiGLU(), True)
    assert sizes[:2] == 2 * [[5, 0, 33, 32, 1]] and len(sizes) % 2 == 0
    padded = sizes[len(sizes) // 2 :]
    assert padded[:4] == 2 * [[32, 0, 64, 32, 32]] + 2 * [[0, 0, 96, 0, 0]]
    assert all(rows % 32 == 0 for each in padded for rows in each)


def test_only_what_is_kept_of_rows_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    use, kept = make_assignment(COUNTS["ragged"], torch.bfloat16), []
    for is_padded in (False, True):
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            pad_and_run(monkeypatch, is_padded, [use], SwiGLU(), True)
        kept.append(sum(storages.values()))
    added = sum(-rows % 32 for rows in COUNTS["ragged"])
    assert kept[1] - kept[0] == added * 3 * FFN * 2


@pytest.mark.parametrize("amx", [False, True])
def test_rows_are_padded_in_bf16_on_a_cpu_with_amx_alone(amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_mlp, "has_amx", lambda: amx)
    for dtype in TOLERANCE:
        assert expert_mlp.needs_padding(torch.empty(0, dtype=dtype)) == (amx and dtype == torch.bfloat16)
    assert not expert_mlp.needs_padding(torch.empty(0, dtype=torch.bfloat16, device="meta"))


@pytest.mark.skipif(platform.system() != "Linux", reason="the flags of the CPU are read from /proc/cpuinfo")
def test_amx_is_what_the_kernel_says() -> None:
    assert expert_mlp.has_amx() == ("amx_tile" in Path("/proc/cpuinfo").read_text().split())
