"""Routing and its losses against values worked out by hand, brute force, and Megatron-Core's own functions."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from coe_megatron.chain.routing import (
    RouterSettings,
    batch_aux_loss,
    expert_load,
    route,
    router_losses,
    scores,
    sequence_aux_loss,
    updated_bias,
    within_best_groups,
    z_loss,
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def all_valid(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def routing_of(logits_TN, settings):
    """The routing that given logits lead to: tokens are the logits, the router is the identity."""
    return route(logits_TN, torch.eye(settings.num_experts, dtype=logits_TN.dtype), settings)


def test_weights_by_hand():
    logits = torch.tensor([[math.log(4.0), math.log(3.0), math.log(2.0), math.log(1.0)]], dtype=torch.float64)
    cases = [
        (RouterSettings(4, 2), [0.4, 0.3, 0, 0]),
        (RouterSettings(4, 2, renormalise=True), [4 / 7, 3 / 7, 0, 0]),
        (RouterSettings(4, 2, renormalise=True, scaling=2.5), [10 / 7, 7.5 / 7, 0, 0]),
        # sigmoid(log a) = a / (1 + a): 0.8 and 0.75
        (RouterSettings(4, 2, "sigmoid"), [0.8 / 1.55, 0.75 / 1.55, 0, 0]),
        (RouterSettings(4, 1, "sigmoid"), [0.8, 0, 0, 0]),
    ]
    for settings, expected in cases:
        routing = routing_of(logits, settings)
        torch.testing.assert_close(routing.gates_TN, torch.tensor([expected], dtype=torch.float64))
        assert torch.equal(routing.chosen_TN, routing.gates_TN > 0)


def test_scores_are_fp32_for_half_precision_tokens():
    logits = torch.randn(5, 4, dtype=torch.bfloat16)
    assert scores(logits, "softmax").dtype == scores(logits, "sigmoid").dtype == torch.float32
    routing = route(torch.randn(5, 3).bfloat16(), torch.randn(4, 3).bfloat16(), RouterSettings(4, 2))
    assert routing.logits_TN.dtype == torch.float32


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("groups", "best", "topk"), [(4, 2, 4), (3, 1, 2), (2, 2, 4), (6, 3, 3)])
def test_group_limited_choice_by_brute_force(function, groups, best, topk):
    settings = RouterSettings(12, topk, function, num_groups=groups, group_topk=best)
    routing = routing_of(torch.randn(20, 12, dtype=torch.float64), settings)
    size, share = 12 // groups, topk // best
    for row, chosen in zip(routing.scores_TN.tolist(), routing.chosen_TN.tolist(), strict=True):
        members = [range(g * size, (g + 1) * size) for g in range(groups)]
        worth = [sum(sorted((row[i] for i in member), reverse=True)[:share]) for member in members]
        kept = max(itertools.combinations(range(groups), best), key=lambda some: sum(worth[g] for g in some))
        allowed = [i for g in kept for i in members[g]]
        expected = set(sorted(allowed, key=lambda i: -row[i])[:topk])
        assert {i for i, one in enumerate(chosen) if one} == expected


def test_groups_are_worth_logits_where_softmax_comes_after_the_choice():
    """Two experts of logit 2 and 2 beat 3 and -9 by logits; by scores exp(3) + exp(-9) beats 2·exp(2)."""
    logits = torch.tensor([[3.0, -9.0, 2.0, 2.0]])
    before = RouterSettings(4, 2, num_groups=2, group_topk=1)
    after = replace(before, renormalise=True)
    assert routing_of(logits, before).chosen_TN.tolist() == [[True, True, False, False]]
    assert routing_of(logits, after).chosen_TN.tolist() == [[False, False, True, True]]
    assert within_best_groups(logits, before)[0, :2].isneginf().all()


def test_bias_moves_the_choice_but_not_the_weights():
    settings = RouterSettings(3, 1, "sigmoid", expert_bias=True)
    x, weight = torch.tensor([[2.0, 1.0, 0.0]]), torch.eye(3)
    plain = route(x, weight, settings, torch.zeros(3))
    moved = route(x, weight, settings, torch.tensor([0.0, 0.0, 10.0]))
    assert plain.chosen_TN.tolist() == [[True, False, False]]
    assert moved.chosen_TN.tolist() == [[False, False, True]]
    torch.testing.assert_close(moved.gates_TN, torch.tensor([[0.0, 0.0, 0.5]]))


def test_bias_goes_up_for_the_idle_and_down_for_the_busy():
    bias = updated_bias(torch.tensor([0.5, 0.0, 0.0]), torch.tensor([9, 3, 0]), rate=0.1)
    torch.testing.assert_close(bias, torch.tensor([0.4, 0.1, 0.1]))
    assert updated_bias(torch.zeros(2), torch.tensor([4, 4]), rate=0.1).tolist() == [0, 0]


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_balanced_routing_costs_exactly_the_coefficient(function):
    """Each token prefers another expert by the same margin: f and P are both 1/N, so N Σ f P = 1."""
    settings = RouterSettings(4, 1, function, seq_aux_coeff=0.3, aux_coeff=0.7)
    routing = routing_of(torch.eye(4, dtype=torch.float64).repeat(2, 1), settings)
    losses = router_losses(routing, settings, all_valid(2, 4))
    assert losses["seq_aux_loss"].item() == pytest.approx(0.3)
    assert losses["aux_loss"].item() == pytest.approx(0.7)


def test_collapsed_routing_costs_n_over_k():
    settings = RouterSettings(4, 1)
    routing = routing_of(torch.tensor([[60.0, 0, 0, 0]], dtype=torch.float64).repeat(6, 1), settings)
    assert batch_aux_loss(routing, settings, all_valid(2, 3)).item() == pytest.approx(4.0)


def test_sequence_loss_sees_what_the_batch_loss_averages_away():
    """Sequence 1 sends all to expert 0, sequence 2 all to expert 1: balanced as a batch, not as sequences."""
    settings = RouterSettings(2, 1)
    logits = torch.tensor([[60.0, 0.0]] * 3 + [[0.0, 60.0]] * 3, dtype=torch.float64)
    routing = routing_of(logits, settings)
    assert batch_aux_loss(routing, settings, all_valid(2, 3)).item() == pytest.approx(1.0)
    assert sequence_aux_loss(routing, settings, all_valid(2, 3)).item() == pytest.approx(2.0)


def test_losses_by_hand_with_padding_and_sequences_of_unequal_length():
    """Lengths 3 and 1: the mean length 2 takes the place of each sequence's own, as in Megatron-Core."""
    settings = RouterSettings(2, 1)
    logits = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 2], [5, 5], [9, 0]], dtype=torch.float64)
    valid = torch.tensor([[True, True, True], [True, False, False]])
    routing = routing_of(logits, settings)
    p, q = math.e / (1 + math.e), math.exp(2) / (1 + math.exp(2))
    first = 2 * (2 / 2 * (2 * p + 1 - p) / 2 + 1 / 2 * (2 * (1 - p) + p) / 2)
    second = 2 * (1 / 2 * q / 2)
    assert sequence_aux_loss(routing, settings, valid).item() == pytest.approx((first + second) / 2)
    batch = 2 * (2 / 4 * (2 * p + 1 - p + 1 - q) / 4 + 2 / 4 * (2 * (1 - p) + p + q) / 4)
    assert batch_aux_loss(routing, settings, valid).item() == pytest.approx(batch)
    squares = [math.log(1 + math.e) ** 2] * 3 + [math.log(1 + math.exp(2)) ** 2]
    assert z_loss(routing, valid).item() == pytest.approx(sum(squares) / 4)
    assert expert_load(routing, valid).tolist() == [2, 2]


def test_bias_and_groups_stay_out_of_the_balancing_loss():
    logits = torch.randn(6, 4, dtype=torch.float64)
    plain = RouterSettings(4, 2, "sigmoid")
    limited = replace(plain, num_groups=2, group_topk=1, expert_bias=True)
    a, b = routing_of(logits, plain), route(logits, torch.eye(4).double(), limited, torch.tensor([9.0, 0, 9, 0]))
    assert not torch.equal(a.chosen_TN, b.chosen_TN)
    assert torch.equal(batch_aux_loss(a, plain, all_valid(2, 3)), batch_aux_loss(b, limited, all_valid(2, 3)))


@pytest.fixture(scope="module")
def megatron():
    return pytest.importorskip("megatron.core.transformer.moe.moe_utils", reason="Megatron-Core is not installed")


@pytest.mark.parametrize(
    "settings",
    [
        RouterSettings(8, 4),
        RouterSettings(8, 4, renormalise=True, scaling=2.5),
        RouterSettings(8, 4, num_groups=4, group_topk=2),
        RouterSettings(8, 4, renormalise=True, num_groups=4, group_topk=2),
        RouterSettings(8, 4, "sigmoid", expert_bias=True, num_groups=4, group_topk=2, scaling=2.5),
        RouterSettings(8, 1, "sigmoid"),
    ],
)
def test_routing_and_losses_equal_megatrons(megatron, settings):
    rows, length, n, k = 3, 5, settings.num_experts, settings.topk
    x, weight, bias = torch.randn(rows * length, 6), torch.randn(n, 6), 0.3 * torch.randn(n)
    bias = bias if settings.expert_bias else None
    ours = route(x, weight, settings, bias)
    weights, chosen = megatron.topk_routing_with_score_function(
        x @ weight.T,
        k,
        use_pre_softmax=not settings.renormalise,
        num_groups=settings.num_groups,
        group_topk=settings.group_topk,
        scaling_factor=settings.scaling,
        score_function=settings.score_function,
        expert_bias=bias,
    )
    assert torch.equal(ours.chosen_TN, chosen)
    torch.testing.assert_close(ours.gates_TN, weights)

    valid = torch.arange(length) < torch.tensor([[5], [2], [4]])
    padding = ~valid.flatten()
    counted, probs = megatron.compute_routing_scores_for_aux_loss(
        ours.logits_TN, k, settings.score_function, padding_mask=padding
    )
    tokens = counted.sum() / k
    theirs = megatron.switch_load_balancing_loss_func(probs, counted.sum(0), tokens, k, n, 1.0)
    torch.testing.assert_close(batch_aux_loss(ours, settings, valid), theirs)
    # Megatron lays the experts of all sequences side by side: [S, B * N], sequence first.
    wide = [t.unflatten(0, (rows, length)).transpose(0, 1).flatten(1) for t in (probs, counted)]
    theirs = megatron.switch_load_balancing_loss_func(wide[0], wide[1].sum(0), tokens / rows, k, n, 1.0) / rows
    torch.testing.assert_close(sequence_aux_loss(ours, settings, valid), theirs)
    torch.testing.assert_close(z_loss(ours, valid), megatron.z_loss_func(ours.logits_TN, 1.0, padding))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_experts": 0}, "num_experts is 0"),
        ({"topk": 9}, "topk is 9.*from 1 to num_experts, 8"),
        ({"topk": True}, "topk is True"),
        ({"score_function": "tanh"}, "score_function is 'tanh'.*softmax or sigmoid"),
        ({"topk": 1, "renormalise": True}, "renormalise is True"),
        ({"scaling": 0.0}, "scaling is 0.0"),
        ({"z_coeff": -1.0}, "z_coeff is -1.0"),
        ({"aux_coeff": math.nan}, "aux_coeff is nan"),
        ({"expert_bias": True}, "expert_bias is True.*sigmoid"),
        ({"group_topk": 1}, "num_groups is None"),
        ({"num_groups": 4}, "group_topk is None"),
        ({"num_groups": 3, "group_topk": 1}, "num_groups is 3.*divisor of num_experts, 8"),
        ({"num_groups": 4, "group_topk": 3}, "group_topk is 3"),
        ({"num_groups": 8, "group_topk": 1}, "group_topk is 1.*1 experts must hold topk"),
    ],
)
def test_bad_router_settings_are_one_clear_line(fields, named):
    with pytest.raises(ValueError, match=named) as error:
        RouterSettings(**({"num_experts": 8, "topk": 2} | fields))
    assert "\n" not in str(error.value)
