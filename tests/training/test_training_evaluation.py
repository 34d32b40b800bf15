"""Validation: every counted token weighs the same, in each named set and over all of them."""

import math

import pytest
import torch

from coe_megatron.training.evaluation import Batch, ValidationSet, unigram_entropy, validate

pytestmark = pytest.mark.usefixtures("single_rank")


class Echo(torch.nn.Module):
    """A model whose loss of a token is the number that stands in the token's place."""

    pre_process = True  # it has the embedding

    def forward(
        self, tokens: torch.Tensor, _positions: torch.Tensor, _mask: None, labels: torch.Tensor, padding_mask: None
    ) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        return tokens


def _batch(*rows: tuple[list[int], int]) -> Batch:
    """Rows of token losses, of which so many count."""
    tokens = torch.tensor([losses for losses, _ in rows])
    counted = torch.tensor([count for _, count in rows])
    mask = (torch.arange(tokens.shape[1]) < counted[:, None]).float()
    return {"tokens": tokens, "labels": tokens, "position_ids": tokens, "loss_mask": mask, "padding_mask": mask == 0}


def test_losses_are_means_over_counted_tokens_and_sets_weigh_by_theirs() -> None:
    near = ValidationSet([_batch(([2, 4, 99], 2), ([9, 99, 99], 1)), _batch(([1, 1, 1], 3))], bytes_per_token=2.0)
    far = ValidationSet([_batch(([6, 8, 99], 2))], bytes_per_token=5.0)
    model = Echo().train()
    found = validate(model, {"near": near, "far": far})
    assert model.training
    assert found["valid"]["near"] == pytest.approx({"loss": 18 / 6, "bits_per_byte": 18 / math.log(2) / 12})
    assert found["valid"]["far"] == pytest.approx({"loss": 14 / 2, "bits_per_byte": 14 / math.log(2) / 10})
    assert found["valid_loss"] == pytest.approx(32 / 8)
    assert found["valid_bits_per_byte"] == pytest.approx(32 / math.log(2) / 22)
    assert validate(model, {"near": near}) == pytest.approx(
        {"valid_loss": 3.0, "valid_bits_per_byte": 1.5 / math.log(2)}
    )


def test_a_set_without_a_token_that_counts_is_named() -> None:
    with pytest.raises(ValueError, match="validation set far has no token"):
        validate(Echo(), {"far": ValidationSet([_batch(([1, 2], 0))], 1.0)})


def test_the_entropy_is_that_of_the_counted_labels() -> None:
    batches = [_batch(([0, 1, 5], 2), ([2, 3, 3], 2))]
    assert unigram_entropy(batches, 8) == pytest.approx(math.log(4))
