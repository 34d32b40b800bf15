"""The small language model: causal, padded at the end without effect, and learning."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from coe_megatron.chain.language_model import ChainLanguageModel, ModelSettings, next_token_loss, rotate
from coe_megatron.chain.routing import RouterSettings
from coe_megatron.chain.settings import ChainSettings

EXAMPLE = Path(__file__).parents[2] / "examples" / "chain_in_50_lines.py"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def make_model(**options):
    router = RouterSettings(4, 2, seq_aux_coeff=0.01, z_coeff=0.01)
    return ChainLanguageModel(ModelSettings(11, 8, 2, 2, 6, router, ChainSettings(2), **options))


def test_a_token_changes_no_logits_before_it():
    model, tokens = make_model(shared_ffn=4), torch.randint(11, (2, 6))
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    a, b = model(tokens).logits, model(changed).logits
    assert a.shape == (2, 6, 11)
    torch.testing.assert_close(a[:, :4], b[:, :4])
    assert (a[:, 4:] - b[:, 4:]).abs().amin(dim=(0, 2)).min() > 0


def test_padding_at_the_end_changes_neither_losses_nor_valid_logits():
    model, tokens = make_model(activation="gelu"), torch.randint(11, (2, 6))
    padding = torch.tensor([[False] * 6, [False] * 3 + [True] * 3])
    other = torch.where(padding, (tokens + 1) % 11, tokens)
    a, b = model(tokens, padding), model(other, padding)
    torch.testing.assert_close(a.logits[~padding], b.logits[~padding])
    assert a.balance_loss.item() == b.balance_loss.item() > 0
    assert next_token_loss(a.logits, tokens, ~padding).item() == next_token_loss(b.logits, other, ~padding).item()


def test_rotation_makes_products_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 6, 8)
    products = rotate(q, 10_000.0)[0, 0] @ rotate(k, 10_000.0)[0, 0].T
    for distance in range(-3, 4):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.allclose(products[0, 0], products[0, 1])


def test_loss_starts_at_guessing_and_counts_only_what_it_should():
    tokens, logits = torch.randint(11, (3, 5)), torch.zeros(3, 5, 11)
    assert next_token_loss(logits, tokens).item() == pytest.approx(math.log(11), abs=1e-5)
    logits[:, 1].scatter_(1, tokens[:, 2:3], 50.0)
    counted = torch.zeros_like(tokens, dtype=torch.bool)
    counted[:, 2] = True
    assert next_token_loss(logits, tokens, counted).item() == pytest.approx(0.0, abs=1e-6)


def test_every_parameter_gets_a_gradient():
    model, tokens = make_model(shared_ffn=4), torch.randint(11, (4, 8))
    output = model(tokens)
    (next_token_loss(output.logits, tokens) + output.balance_loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bad_heads_are_refused():
    with pytest.raises(ValueError, match="hidden is 9"):
        ModelSettings(11, 9, 1, 2, 6, RouterSettings(4, 2), ChainSettings())


@pytest.mark.slow
def test_the_example_learns_and_is_short(capsys):
    spec = importlib.util.spec_from_file_location("chain_in_50_lines", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    losses = example.main(steps=120)
    assert losses[0] == pytest.approx(math.log(example.MODULUS), abs=0.2)
    assert sum(losses[-5:]) / 5 < 0.5
    assert "layer 2, iteration 2: tokens per expert" in capsys.readouterr().out
    assert example.main(steps=2) == losses[:2]
    assert len(EXAMPLE.read_text().splitlines()) <= 50
