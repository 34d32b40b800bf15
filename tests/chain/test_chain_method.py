"""The oracle against equations worked out by other means: plain Python floats, brute force, gradcheck."""

import itertools
import math
from typing import get_args

import pytest
import torch

from coe_megatron.chain.method import ChainOfExperts, feed_forward, routed_experts
from coe_megatron.chain.routing import RouterSettings, route, sequence_aux_loss
from coe_megatron.chain.settings import ChainSettings, Gating, NormPlacement, Residual

KINDS = list(itertools.product(get_args(Gating), get_args(Residual), get_args(NormPlacement)))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def make_layer(chain, router=None, hidden=4, ffn=3, shared_ffn=0, **options):
    """A float64 layer with weights large enough that every part matters, small enough that C = 4 stays tame."""
    router = router or RouterSettings(num_experts=4, topk=2)
    layer = ChainOfExperts(hidden, ffn, router, chain, shared_ffn=shared_ffn, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.4)
        for gain in layer.norm_gains:
            gain.uniform_(0.5, 1.5)
    return layer


# The equations in plain Python: one token, lists of floats.


def plain_norm(x, gain, eps):
    scale = 1 / math.sqrt(sum(v * v for v in x) / len(x) + eps)
    return [v * scale * g for v, g in zip(x, gain, strict=True)]


def plain_product(matrix, x):
    return [sum(w * v for w, v in zip(row, x, strict=True)) for row in matrix]


def plain_expert(x, w1, w2):
    inner = plain_product(w1, x)
    half = len(inner) // 2
    gated = [a / (1 + math.exp(-a)) * b for a, b in zip(inner[:half], inner[half:], strict=True)]
    return plain_product(w2, gated)


def plain_gates(x, weight, topk, masked=()):
    logits = plain_product(weight, x)
    left = [i for i in range(len(logits)) if i not in masked]
    total = sum(math.exp(logits[i] - max(logits)) for i in left)
    chosen = sorted(left, key=lambda i: -logits[i])[:topk]
    return {i: math.exp(logits[i] - max(logits)) / total for i in chosen}


def plain_mixed(streams, f, mix, write):
    """R X + o f, for streams as n lists."""
    kept = zip(*(plain_product(mix, values) for values in zip(*streams, strict=True)), strict=True)
    return [[a + w * b for a, b in zip(each, f, strict=True)] for each, w in zip(kept, write, strict=True)]


def plain_mixing(weights, t, n):
    """i_t, o_t and R_t of the oracle's vectors."""
    values = weights[f"variants.stream_weights.{t}"]
    return values[:n], values[n : 2 * n], [values[n * row : n * (row + 1)] for row in range(2, n + 2)]


def plain_mean(streams):
    return [sum(values) / len(values) for values in zip(*streams, strict=True)]


def plain_chain(layer, h):
    """h' of one token, by the definitions of each norm_placement and residual rather than by a common one."""
    chain, topk = layer.chain, layer.router.topk
    weights = {name: value.tolist() for name, value in layer.named_parameters()}
    own_norms = chain.norm_placement == "iteration_norm"
    u = plain_norm(h, weights["norm_gains.0"], layer.norm_eps)
    into, out_of = weights.get("variants.latent_down"), weights.get("variants.latent_up")
    start = plain_product(into, u) if into else h if own_norms else u
    streams, untouched = ([start] * (chain.streams or 1) for _ in range(2))  # with and without increments
    x, increments, gates, visited = start, [], {}, set()
    for t in range(chain.iterations):
        if chain.streams:
            read, write, mix = plain_mixing(weights, t, chain.streams)
            x = [sum(a * b for a, b in zip(read, values, strict=True)) for values in zip(*streams, strict=True)]
        n = plain_norm(x, weights[f"norm_gains.{t}"], layer.norm_eps) if own_norms else x
        if chain.conditioned:
            n = [a * v for a, v in zip(weights[f"variants.state_gains.{t}"], n, strict=True)]
        if chain.modulation_rank:
            inner = [a / (1 + math.exp(-a)) for a in plain_product(weights["variants.modulation_down"], n)]
            seen = plain_product(weights[f"variants.modulation_up.{t}"], inner)
            n = [(1 + a) * v for a, v in zip(seen, n, strict=True)]
        if chain.gating != "fixed" or t == 0:
            router = t if chain.gating == "independent" else 0
            gates = plain_gates(n, weights[f"router_weights.{router}"], topk, visited if chain.no_return else ())
            visited |= gates.keys()
        f = plain_expert(n, weights["shared_w1"], weights["shared_w2"])
        for i, g in gates.items():
            f = [a + g * b for a, b in zip(f, plain_expert(n, weights["w1"][i], weights["w2"][i]), strict=True)]
        gain = weights.get(f"variants.increment_gains.{t}", [1.0] * len(x))
        f = [a * v for a, v in zip(gain, f, strict=True)]
        increments.append(f)
        if chain.streams:
            streams = plain_mixed(streams, f, mix, write)
            untouched = plain_mixed(untouched, [0.0] * len(f), mix, write)
        added = {"inner": x, "init": start, "outer": [0.0] * len(x)}[chain.residual]
        x = [a + b for a, b in zip(f, added, strict=True)]
    end = [a + b for a, b in zip(x, start, strict=True)] if chain.residual == "outer" else x
    if chain.streams or out_of:
        start, end = (plain_mean(untouched), plain_mean(streams)) if chain.streams else (start, end)
        delta = [a - b for a, b in zip(end, start, strict=True)]
        base = u if chain.norm_placement == "reference" else h
        return [a + b for a, b in zip(base, plain_product(out_of, delta) if out_of else delta, strict=True)]
    if chain.norm_placement == "prenorm":
        return [a + b - c for a, b, c in zip(h, end, u, strict=True)]
    return end


@pytest.mark.parametrize(("gating", "residual", "norm_placement"), KINDS)
@pytest.mark.parametrize("iterations", [1, 2, pytest.param(3, marks=pytest.mark.thorough)])
def test_equals_the_equations_in_plain_python(gating, residual, norm_placement, iterations):
    layer = make_layer(ChainSettings(iterations, gating, residual, norm_placement), shared_ffn=2)
    h = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = [plain_chain(layer, token) for token in h.flatten(0, 1).tolist()]
    torch.testing.assert_close(layer(h).stream.flatten(0, 1), torch.tensor(expected, dtype=torch.float64))


VARIANTS = [
    ChainSettings(3, residual="init", learned_scale=1.0),
    ChainSettings(2, "fixed", "outer", "iteration_norm", learned_scale=1.0),
    ChainSettings(3, conditioned=True),
    ChainSettings(3, no_return=True),
    ChainSettings(3, "shared_router", "init", no_return=True, conditioned=True),
    ChainSettings(3, "fixed", "outer", "reference", learned_scale=1.0, conditioned=True),
    ChainSettings(3, modulation_rank=2),
    ChainSettings(2, "fixed", "init", "iteration_norm", modulation_rank=1, learned_scale=1.0),
    ChainSettings(3, streams=2),
    ChainSettings(3, norm_placement="iteration_norm", streams=3, modulation_rank=2),
    ChainSettings(2, norm_placement="reference", streams=2, latent=3),
    ChainSettings(1, latent=3),
    ChainSettings(3, "shared_router", "outer", "reference", latent=2, learned_scale=1.0),
    ChainSettings(3, residual="init", latent=3, modulation_rank=2),
]


@pytest.mark.parametrize("chain", VARIANTS)
def test_variants_equal_the_equations_in_plain_python(chain):
    layer = make_layer(chain, RouterSettings(num_experts=6, topk=2), shared_ffn=2)
    h = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    expected = [plain_chain(layer, token) for token in h.flatten(0, 1).tolist()]
    stream = layer(h).stream
    torch.testing.assert_close(stream.flatten(0, 1), torch.tensor(expected, dtype=torch.float64))
    stream.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())


def test_gains_start_at_the_learned_scale_and_a_chain_at_zero_is_no_chain():
    chain = ChainSettings(2, learned_scale=0.0)
    layer = ChainOfExperts(4, 3, RouterSettings(4, 2), chain)
    assert [gain.tolist() for gain in layer.variants.increment_gains] == [[0.0] * 4] * 2
    h = torch.randn(2, 3, 4)
    assert torch.equal(layer(h).stream, h)


@pytest.mark.parametrize("norm_placement", get_args(NormPlacement))
@pytest.mark.parametrize("variant", [{"modulation_rank": 2}, {"streams": 3}, {"streams": 2, "modulation_rank": 1}])
def test_modulation_and_streams_start_as_the_plain_chain(variant, norm_placement):
    """To the last bit, and each of their parameters but W1, which waits for W2, has a gradient at once."""
    torch.manual_seed(1)
    router = RouterSettings(num_experts=4, topk=2)
    layer = ChainOfExperts(4, 3, router, ChainSettings(3, norm_placement=norm_placement, **variant), shared_ffn=2)
    plain = ChainOfExperts(4, 3, router, ChainSettings(3, norm_placement=norm_placement), shared_ffn=2)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            layer.get_parameter(name).copy_(parameter.normal_(std=0.4))
    h = torch.randn(2, 3, 4)
    assert torch.equal(layer(h).stream, plain(h).stream)
    layer(h).stream.square().sum().backward()
    waiting = [name for name, parameter in layer.named_parameters() if not parameter.grad.any()]
    assert waiting == ["variants.modulation_down"] * ("modulation_rank" in variant)


def test_conditioned_with_gains_of_one_is_the_plain_chain():
    layer = make_layer(ChainSettings(3, conditioned=True), shared_ffn=2)
    plain = make_layer(ChainSettings(3), shared_ffn=2)
    h = torch.randn(2, 3, 4, dtype=torch.float64)
    for gain in layer.variants.state_gains:
        torch.nn.init.ones_(gain)
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "state_gains" not in name})
    assert torch.equal(layer(h).stream, plain(h).stream)


@pytest.mark.parametrize(("gating", "residual", "norm_placement"), KINDS)
def test_forward_and_backward_are_finite_and_reach_every_parameter(gating, residual, norm_placement):
    router = RouterSettings(4, 2, seq_aux_coeff=0.1, aux_coeff=0.1, z_coeff=0.1)
    for iterations, dtype in itertools.product((1, 2, 3, 4), (torch.float32, torch.bfloat16)):
        layer = make_layer(ChainSettings(iterations, gating, residual, norm_placement), router, shared_ffn=2).to(dtype)
        output = layer(torch.randn(2, 5, 4, dtype=dtype))
        assert output.stream.dtype == dtype and output.stream.isfinite().all()
        assert output.routings[0].gates_TN.dtype == torch.float32
        assert len(output.losses) == len(output.routings) == iterations
        (output.stream.float().square().sum() + output.total_loss).backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("chain", "router", "activation"),
    [
        (ChainSettings(2), RouterSettings(3, 2, seq_aux_coeff=0.3, z_coeff=0.2), "swiglu"),
        (
            ChainSettings(3, "shared_router", "init", "reference"),
            RouterSettings(3, 2, "sigmoid", aux_coeff=0.3),
            "gelu",
        ),
        (ChainSettings(2, "fixed", "outer", "iteration_norm"), RouterSettings(3, 2, renormalise=True), "swiglu"),
    ],
)
def test_gradcheck(chain, router, activation):
    layer = make_layer(chain, router, hidden=3, ffn=2, shared_ffn=2, activation=activation)
    h = torch.randn(1, 3, 3, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def function(h, *values):
        output = torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (h,))
        return output.stream, output.total_loss

    assert torch.autograd.gradcheck(function, (h, *parameters.values()))


# One iteration, and what the topologies are to each other.


def test_one_iteration_is_a_plain_moe_whatever_the_gating_and_residual():
    h = torch.randn(2, 3, 4, dtype=torch.float64)
    first = make_layer(ChainSettings(1), shared_ffn=2)
    u = torch.nn.functional.rms_norm(h, (4,), first.norm_gains[0], 1e-6).flatten(0, 1)
    routing = route(u, first.router_weights[0], first.router)
    moe = routed_experts(u, routing, first.w1, first.w2, "swiglu")
    moe = (moe + feed_forward(u, first.shared_w1, first.shared_w2, "swiglu")).view_as(h)
    for gating, residual, norm_placement in KINDS:
        layer = make_layer(ChainSettings(1, gating, residual, norm_placement), shared_ffn=2)
        layer.load_state_dict(first.state_dict())
        base = u.view_as(h) if norm_placement == "reference" else h
        assert torch.equal(layer(h).stream, base + moe), (gating, residual, norm_placement)


def test_the_increment_is_exact_in_low_precision():
    """Nothing is subtracted: with experts at zero the stream comes out bit for bit, however large it is."""
    for residual in get_args(Residual):
        layer = make_layer(ChainSettings(3, residual=residual)).bfloat16()
        torch.nn.init.zeros_(layer.w2)
        h = 1000 * torch.randn(2, 3, 4, dtype=torch.bfloat16)
        assert torch.equal(layer(h).stream, h)


@pytest.mark.parametrize("residual", get_args(Residual))
def test_prenorm_and_reference_differ_by_what_the_norm_took(residual):
    prenorm = make_layer(ChainSettings(3, residual=residual), shared_ffn=2)
    reference = make_layer(ChainSettings(3, residual=residual, norm_placement="reference"), shared_ffn=2)
    reference.load_state_dict(prenorm.state_dict())
    h = torch.randn(2, 3, 4, dtype=torch.float64)
    u = torch.nn.functional.rms_norm(h, (4,), prenorm.norm_gains[0], 1e-6)
    torch.testing.assert_close(prenorm(h).stream - h, reference(h).stream - u)


def test_iteration_norm_is_a_stack_of_prenorm_layers_that_share_experts():
    chain = make_layer(ChainSettings(3, norm_placement="iteration_norm"), shared_ffn=2)
    single = make_layer(ChainSettings(1), shared_ffn=2)
    h = stream = torch.randn(2, 3, 4, dtype=torch.float64)
    own = {"router_weights.0", "norm_gains.0"}
    for t in range(3):
        state = {name: value for name, value in chain.state_dict().items() if name.split(".")[0] + ".0" not in own}
        state |= {"router_weights.0": chain.router_weights[t], "norm_gains.0": chain.norm_gains[t]}
        single.load_state_dict(state)
        stream = single(stream).stream
    torch.testing.assert_close(chain(h).stream, stream)


def test_number_of_parameters_follows_gating_and_topology():
    for gating, routers, biases in (("independent", 3, 3), ("shared_router", 1, 3), ("fixed", 1, 1)):
        router = RouterSettings(4, 2, "sigmoid", expert_bias=True)
        layer = make_layer(ChainSettings(3, gating), router)
        assert (len(layer.router_weights), len(layer.expert_biases)) == (routers, biases)
    assert len(make_layer(ChainSettings(3, norm_placement="iteration_norm")).norm_gains) == 3
    plain = make_layer(ChainSettings(3))
    assert plain.expert_biases is None and plain.shared_w1 is None and len(plain.norm_gains) == 1


def test_fixed_gating_reuses_the_routing_and_charges_it_once():
    router = RouterSettings(4, 2, seq_aux_coeff=0.5)
    h = torch.randn(2, 3, 4, dtype=torch.float64)
    for balance in ("sum", "mean"):
        output = make_layer(ChainSettings(3, "fixed", aux_loss_reduction=balance), router)(h)
        assert all(routing is output.routings[0] for routing in output.routings)
        assert output.losses[1:] == [{}, {}]
        expected = 0.5 * sequence_aux_loss(output.routings[0], router, torch.ones(2, 3, dtype=torch.bool))
        torch.testing.assert_close(output.total_loss, expected)


def test_balance_mean_divides_by_the_number_of_routings():
    router = RouterSettings(4, 2, seq_aux_coeff=0.5, aux_coeff=0.2, z_coeff=0.1)
    h = torch.randn(2, 3, 4, dtype=torch.float64)
    full = make_layer(ChainSettings(4, "shared_router"), router)
    mean = make_layer(ChainSettings(4, "shared_router", aux_loss_reduction="mean"), router)
    mean.load_state_dict(full.state_dict())
    for a, b in zip(full(h).losses, mean(h).losses, strict=True):
        assert a.keys() == b.keys() == {"seq_aux_loss", "aux_loss", "z_loss"}
        for name in a:
            torch.testing.assert_close(a[name] / 4, b[name])


@pytest.mark.parametrize("gating", get_args(Gating))
def test_bias_updates_balance_the_load_of_every_iteration(gating):
    router = RouterSettings(4, 1, "sigmoid", expert_bias=True)
    layer = make_layer(ChainSettings(2, gating), router)
    h = torch.randn(8, 16, 4, dtype=torch.float64)
    before = layer(h).loads.max(dim=1).values
    for _ in range(150):
        with torch.no_grad():
            layer.update_expert_biases(layer(h).loads, rate=0.02)
    after = layer(h).loads.max(dim=1).values
    assert (after <= before).all() and (after < 1.4 * 128 / 4).all(), (before, after)


# Experts.


def test_activations_by_hand():
    x = torch.tensor([[2.0]])
    silu, gelu = 2 / (1 + math.exp(-2)), 2 * 0.5 * (1 + math.erf(math.sqrt(2)))
    swiglu = feed_forward(x, torch.tensor([[1.0], [3.0]]), torch.tensor([[0.5]]), "swiglu")
    assert swiglu.item() == pytest.approx(silu * 6 * 0.5)
    assert feed_forward(x, torch.tensor([[1.0]]), torch.tensor([[0.5]]), "gelu").item() == pytest.approx(gelu / 2)


def test_several_shared_experts_are_one_wide_expert():
    x, w1, w2 = torch.randn(5, 4), torch.randn(2, 6, 4), torch.randn(2, 4, 3)
    gate_then_value = torch.cat([w1[:, :3].flatten(0, 1), w1[:, 3:].flatten(0, 1)])
    wide = feed_forward(x, gate_then_value, torch.cat(list(w2), dim=1), "swiglu")
    torch.testing.assert_close(wide, sum(feed_forward(x, w1[i], w2[i], "swiglu") for i in range(2)))


def test_one_expert_takes_all_tokens_and_the_others_none():
    layer = make_layer(ChainSettings(1), RouterSettings(4, 1))
    with torch.no_grad():
        layer.router_weights[0].zero_()
        layer.router_weights[0][2] = 50.0
    h = torch.rand(2, 3, 4, dtype=torch.float64) + 0.1
    output = layer(h)
    assert output.loads.tolist() == [[0, 0, 6, 0]]
    u = torch.nn.functional.rms_norm(h, (4,), layer.norm_gains[0], 1e-6).flatten(0, 1)
    expert = feed_forward(u, layer.w1[2], layer.w2[2], "swiglu").view_as(h)
    torch.testing.assert_close(output.stream, h + expert)
    output.stream.sum().backward()
    assert layer.w1.grad[2].any() and not layer.w1.grad[[0, 1, 3]].any()


# Losses and padding.


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_padding_changes_no_loss_and_no_load(function):
    router = RouterSettings(4, 2, function, seq_aux_coeff=0.3, aux_coeff=0.2, z_coeff=0.1)
    layer = make_layer(ChainSettings(2), router, shared_ffn=2)
    padding = torch.tensor([[False] * 5 + [True] * 2, [False] * 3 + [True] * 4])
    h = torch.randn(2, 7, 4, dtype=torch.float64)
    other = torch.where(padding[..., None], 30 * torch.randn_like(h), h)
    a, b = layer(h, padding), layer(other, padding)
    assert a.losses == b.losses and torch.equal(a.loads, b.loads)
    assert a.loads.sum(dim=1).tolist() == [2 * 8, 2 * 8]
    assert torch.equal(a.stream[~padding], b.stream[~padding])
    assert not torch.equal(a.total_loss, layer(h).total_loss)


def test_a_batch_of_padding_alone_costs_nothing():
    router = RouterSettings(4, 2, seq_aux_coeff=0.3, aux_coeff=0.2, z_coeff=0.1)
    output = make_layer(ChainSettings(2), router)(torch.randn(2, 3, 4).double(), torch.ones(2, 3, dtype=torch.bool))
    assert output.total_loss.item() == 0.0


def test_without_coefficients_there_is_no_loss():
    output = make_layer(ChainSettings(2))(torch.randn(2, 3, 4).double())
    assert output.losses == [{}, {}] and output.total_loss.item() == 0.0


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation is 'relu'"):
        make_layer(ChainSettings(1), activation="relu")
