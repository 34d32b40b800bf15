"""Chains made of trained models: their function is that of the model, and training reaches what was added."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from deepspeed import DeepSpeedEngine
from engine_build import take_steps
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from model_build import relative_error, reset_megatron

from coe_megatron.chain.settings import Gating, NormPlacement, Residual
from coe_megatron.checkpoint import listing, save_load
from coe_megatron.checkpoint.storage import MASTER, Reader
from coe_megatron.config.load import dump, load, parse, read, resolve
from coe_megatron.config.settings import RunConfig
from coe_megatron.convert.upcycle import upcycle
from coe_megatron.convert.upcycle_plan import CONFIG, find_config, plan
from coe_megatron.model.build import build_model
from coe_megatron.model.layer import coe_layers, routers
from coe_megatron.zero import engine as zero

VOCAB, LENGTH = 64, 12
BASE = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "seq_length": LENGTH},
    "moe": {"num_experts": 8, "topk": 2, "ffn_hidden_size": 16, "load_balancing": "none"},
    "chain": {"iterations": 1},
    "training": {"global_batch": 8, "micro_batch": 8},
}
BIAS = ("moe.score_function=sigmoid", "moe.expert_bias=true")
MIXED = ("moe.layer_freq=[0,1]", "moe.topk=4")
AS_SHARED = (*MIXED, "model.ffn_hidden_size=32", "moe.num_shared_experts=2", "moe.capacity_factor=1")
AS_COPIES = (*MIXED, "model.ffn_hidden_size=16", "moe.num_shared_experts=0", "moe.scaling=2.5", "moe.renormalise=true")
FEW = {
    ("prenorm", "inner", "independent", BIAS),
    ("reference", "init", "independent", BIAS),
    ("iteration_norm", "init", "fixed", ()),
    ("iteration_norm", "inner", "shared_router", BIAS),
}  # the others are slow
ONE_EXPERT = ("moe.num_experts=1", "moe.topk=1", "moe.scaling=2.5")


def make_engine(config: RunConfig, seed: int, scrambled: bool = False) -> DeepSpeedEngine:
    """The config's model; scrambled, with weights that differ everywhere and show in the output."""
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    model = build_model(config, VOCAB)
    if scrambled:
        for name, parameter in model.named_parameters():
            is_gain = parameter.dim() == 1 and not name.endswith("bias")
            torch.nn.init.normal_(parameter, mean=float(is_gain), std=0.2)
        for _, _, router in routers(model):
            if router.enable_expert_bias:
                router.expert_bias.normal_(std=0.1)
    return zero.build_engine(model, config.optimizer, config.training, config.zero, 1)


def make_source(folder: Path, *settings: str) -> tuple[Path, DeepSpeedEngine]:
    """A run's folder, and its model."""
    folder.mkdir(exist_ok=True)
    (folder / "base.yaml").write_text(dump(parse(BASE)))
    config = resolve(read(folder / "base.yaml"), settings)
    (folder / "config.yaml").write_text(dump(config))
    engine = make_engine(config, 1, scrambled=True)
    save_load.save(folder / "checkpoints", 1, engine, {"step": 1, "tokens": 10, "tokenizer": "T"}, keep=1)
    return folder, engine


def make_chain(source: Path, out: Path, iterations: int, *changes: str, **options: Any) -> DeepSpeedEngine:
    """The chain that a run with `chain.yaml` starts with."""
    upcycle(source, out, plan(find_config(source), out, iterations, changes=changes, **options))
    assert listing.problem(out) is None
    config = load(out / CONFIG)
    assert config.training.warm_start == str(out)
    engine = make_engine(config, 2)
    save_load.load_weights(out, engine)
    return engine


@torch.no_grad()
def logits(engine: DeepSpeedEngine) -> torch.Tensor:
    engine.module.eval()
    tokens = torch.randint(VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(3))
    return engine.module(tokens, torch.arange(LENGTH).expand(4, -1), None)


def gain_of(engine: DeepSpeedEngine) -> list[list[float]]:
    """Of each layer the mean gain of each iteration."""
    return [[gain.mean().item() for gain in layer.variants.increment_gains] for layer in coe_layers(engine.module)]


COMBINATIONS = [
    pytest.param(
        norms, residual, gating, routing, marks=() if (norms, residual, gating, routing) in FEW else pytest.mark.slow
    )
    for norms in get_args(NormPlacement)
    for residual in get_args(Residual)
    for gating in get_args(Gating)
    for routing in ((), BIAS)
    if residual != "outer"
]


@pytest.mark.parametrize(("norms", "residual", "gating", "routing"), COMBINATIONS)
def test_a_chain_of_a_mixture_of_experts_computes_what_it_did(
    norms: str, residual: str, gating: str, routing: tuple[str, ...], single_rank: None, tmp_path: Path
) -> None:
    placed = f"chain.norm_placement={norms}"
    source, before = make_source(tmp_path / "moe", placed, *routing)
    how = "roll" if gating == "independent" else None
    after = make_chain(
        source, tmp_path / "chain", 2, f"chain.residual={residual}", f"chain.gating={gating}", routers=how
    )
    assert torch.equal(logits(after), logits(before))
    assert gain_of(after) == [[1, 0] if residual == "inner" else [0, 1]] * 2


@pytest.mark.parametrize(
    ("settings", "changes", "iterations"),
    [
        (("model.normalization=LayerNorm",), ("chain.norm_placement=iteration_norm",), 2),
        (("chain.norm_placement=iteration_norm", "model.normalization=LayerNorm"), ("chain.residual=init",), 3),
        (("chain.residual=outer",), ("chain.residual=inner", "chain.no_return=true"), 3),
        (("training.precision=bf16", *BIAS), ("chain.conditioned=true",), 2),
        pytest.param(("chain.conditioned=true",), ("chain.residual=init",), 2, marks=pytest.mark.slow),
        pytest.param(("moe.capacity_factor=1",), ("chain.residual=init",), 2, marks=pytest.mark.slow),
        (("model.mla={}",), ("chain.norm_placement=iteration_norm",), 2),
        (("moe.layer_freq=2",), (), 2),
        ((), ("moe.layer_freq=[1,1]",), 2),
    ],
)  # fmt: skip
def test_with_all_else_that_a_layer_can_have(
    settings: tuple[str, ...], changes: tuple[str, ...], iterations: int, single_rank: None, tmp_path: Path
) -> None:
    source, before = make_source(tmp_path / "moe", *settings)
    after = make_chain(source, tmp_path / "chain", iterations, *changes)
    assert torch.equal(logits(after), logits(before))


@pytest.mark.parametrize("residual", ["inner", "init"])
@pytest.mark.parametrize("scale", ["null", "0.5"], ids=["without gains", "with gains"])
@pytest.mark.parametrize("norms", [pytest.param("prenorm", marks=pytest.mark.slow), "iteration_norm"])
def test_a_chain_grows(norms: str, scale: str, residual: str, single_rank: None, tmp_path: Path) -> None:
    placed = (f"chain.norm_placement={norms}", f"chain.residual={residual}", f"chain.learned_scale={scale}")
    source, before = make_source(tmp_path / "two", "chain.iterations=2", *placed, *BIAS)
    three = make_chain(source, tmp_path / "three", 3)
    assert torch.equal(logits(three), logits(before))
    added = 2 if residual == "inner" else 0
    assert [gains.index(0.0) for gains in gain_of(three)] == [added, added]
    five = make_chain(tmp_path / "three", tmp_path / "five", 5, routers="fresh")  # its config is in it
    assert torch.equal(logits(five), logits(before))


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("residual", ["inner", "init"])
@pytest.mark.parametrize("settings", [AS_SHARED, AS_COPIES], ids=["shared", "copies"])
def test_dense_layers_get_experts(
    settings: tuple[str, ...], residual: str, iterations: int, single_rank: None, tmp_path: Path
) -> None:
    source, before = make_source(tmp_path / "mixed", *settings)
    after = make_chain(source, tmp_path / "chain", iterations, "moe.layer_freq=1", f"chain.residual={residual}")
    assert [layer.layer_number for layer in coe_layers(after.module)] == [1, 2]
    if settings is AS_SHARED:  # what is added to the feed-forward is 0
        assert torch.equal(logits(after), logits(before))
    assert relative_error(logits(after), logits(before)) < 1e-6


@pytest.mark.parametrize("iterations", [2, 3])
def test_dense_layers_join_a_chain(iterations: int, single_rank: None, tmp_path: Path) -> None:
    """Each layer has the gains that it needs."""
    source, before = make_source(tmp_path / "mixed", *AS_SHARED, "chain.iterations=2")
    after = make_chain(source, tmp_path / "chain", iterations, "moe.layer_freq=1")
    assert torch.equal(logits(after), logits(before))
    dense, chain = gain_of(after)
    assert (dense, chain) == ([1, *[0] * (iterations - 1)], [1, 1, *[0] * (iterations - 2)])


@pytest.mark.parametrize("gates", ["moe.topk=3,moe.renormalise=true", "moe.topk=4"])
def test_one_expert_becomes_several(gates: str, single_rank: None, tmp_path: Path) -> None:
    """One expert with softmax gates is a dense layer."""
    source, before = make_source(tmp_path / "dense", *ONE_EXPERT)
    changes = ("moe.num_experts=4", *gates.split(","))
    after = make_chain(source, tmp_path / "chain", 2, *changes, routers="roll")
    assert relative_error(logits(after), logits(before)) < 1e-6
    first, second = coe_layers(after.module)
    assert not torch.equal(first.router.weight, second.router.weight)
    assert torch.equal(first.later_routers[0].weight, first.router.weight.roll(2, 0))


def test_what_the_added_routers_are(single_rank: None, tmp_path: Path) -> None:
    source, before = make_source(tmp_path / "moe", *BIAS)
    model = next(coe_layers(before.module)).router
    for how, shift in (("copy", 0), ("roll", 2)):
        layer = next(coe_layers(make_chain(source, tmp_path / how, 3, routers=how).module))
        for number, router in enumerate(layer.later_routers, start=1):
            assert torch.equal(router.weight, model.weight.roll(number * shift, 0))
            assert torch.equal(router.expert_bias, model.expert_bias.roll(number * shift, 0))
    drawn = {}
    for seed in (1, 2, 1):
        out = tmp_path / f"fresh-{len(drawn)}-{seed}"
        layers = list(coe_layers(make_chain(source, out, 3, routers="fresh", seed=seed).module))
        found = torch.stack([router.weight for layer in layers for router in layer.later_routers]).detach()
        assert torch.equal(drawn.setdefault(seed, found), found)
        assert (
            float(found.float().std()) == pytest.approx(0.02, rel=0.1)
            and not layers[0].later_routers[0].expert_bias.any()
        )
        assert len({tuple(weight.flatten().tolist()) for weight in found}) == 4
    assert not torch.equal(drawn[1], drawn[2])


def test_it_holds_what_a_chain_saves(single_rank: None, tmp_path: Path) -> None:
    """The tensors that a chain's own run saves, of the same shape and dtype, without moments."""
    source, _ = make_source(tmp_path / "moe", *BIAS, "training.precision=bf16")
    engine = make_chain(source, tmp_path / "chain", 3, "chain.norm_placement=iteration_norm")
    save_load.save(tmp_path / "own" / "checkpoints", 1, engine, {"step": 1}, keep=1)
    made, own = (
        {key: (entry.size, entry.properties.dtype) for key, entry in Reader(folder / "tensors").entries.items()}
        for folder in (tmp_path / "chain", tmp_path / "own" / "checkpoints" / "step-00000001")
    )
    assert made == {key: value for key, value in own.items() if key in made}
    assert {key for key in own if "exp_avg" not in key} == made.keys()
    assert any(key.startswith(MASTER) for key in made)


@pytest.mark.parametrize("residual", ["inner", "init"])
def test_training_reaches_what_was_added(residual: str, single_rank: None, tmp_path: Path) -> None:
    """Gains from the first step on, routers behind a gain of 0 once it has moved."""
    source, before = make_source(tmp_path / "moe")
    after = make_chain(source, tmp_path / "chain", 2, f"chain.residual={residual}")
    layer = next(coe_layers(after.module))
    gain = layer.variants.increment_gains[1 if residual == "inner" else 0]
    router = layer.later_routers[0] if residual == "inner" else layer.router
    assert not gain.any()
    start = router.weight.clone()
    first = take_steps(after, 0, 1).losses
    reset_megatron()
    assert first == take_steps(before, 0, 1).losses
    assert gain.abs().min() > 0
    take_steps(after, 1, 2)
    assert not torch.equal(router.weight, start)


@pytest.mark.parametrize(
    ("settings", "iterations", "changes", "said"),
    [
        ((), 1, (), "--iterations is 1: the model has 1 already, so it must be at least 2"),
        ((), 2, ("chain.residual=outer",), "chain.residual is outer: an iteration with gain 0 would leave nothing"),
        (("chain.iterations=2", "chain.residual=outer"), 3, (), "only inner and init chains can grow"),
        (("chain.iterations=2",), 3, ("chain.residual=init",), "--set chain.residual: a model of 2 iterations would"),
        ((), 2, ("chain.norm_placement=reference",), "--set chain.norm_placement=reference: a model with 1 iterations"),
        (("chain.latent=8",), 2, (), "chain.latent is 8: only models without it can be converted"),
        (("chain.modulation_rank=2",), 2, (), "chain.modulation_rank is 2: only models without it can be converted"),
        ((), 2, ("chain.residual=init", "chain.no_return=true"), "chain.no_return is true: with chain.residual init"),
        ((), 5, ("chain.no_return=true",), "chain.no_return is true: 5 iterations with 2 experts each need 10"),
        (("chain.layers=[1]",), 2, (), "chain.layers is [1]: the other layers would choose 2 times moe.topk"),
        (("chain.conditioned=true",), 2, ("chain.conditioned=false",), "--set chain.conditioned=false: the model has"),
        ((), 2, ("moe.num_experts=16",), "--set moe.num_experts=16: the model has 8, and only a single expert can"),
        (ONE_EXPERT, 2, ("moe.num_experts=4", "moe.topk=2"), "the gates of a token's copies must sum to 1"),
        ((), 2, ("moe.renormalise=true",), "--set moe.renormalise: other gates do not give the model's function"),
        ((), 2, ("moe.topk=9",), "moe.topk is 9: it must be at most moe.num_experts (8)"),
        ((), 2, ("model.num_layers=3",), "--set model.num_layers: only chain.gating, chain.residual"),
        ((), 2, ("chain.learned_scale=0",), "--set chain.learned_scale: only chain.gating, chain.residual"),
        (MIXED, 2, ("moe.layer_freq=1",), "a dense layer of width 128 (model.ffn_hidden_size) becomes shared experts"),
        (AS_COPIES[:-1], 2, ("moe.layer_freq=1",), "needs moe.renormalise true and moe.topk > 1"),
        ((*AS_COPIES, "moe.capacity_factor=1"), 2, ("moe.layer_freq=1",), "moe.capacity_factor would drop some of a"),
        ((*AS_SHARED, "chain.norm_placement=reference"), 2, ("moe.layer_freq=1",), "dense layers are pre-norm"),
        ((), 2, ("moe.layer_freq=[1,0]",), "--set moe.layer_freq=[1,0]: a layer would lose its experts"),
    ],
)  # fmt: skip
def test_what_cannot_keep_the_function_is_refused(
    settings: tuple[str, ...], iterations: int, changes: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    (tmp_path / "base.yaml").write_text(dump(parse(BASE)))
    (tmp_path / "config.yaml").write_text(dump(resolve(read(tmp_path / "base.yaml"), settings)))
    with pytest.raises(ValueError, match=r".") as raised:
        plan(tmp_path / "config.yaml", tmp_path / "out", iterations, changes=changes)
    assert said in str(raised.value)


def test_a_checkpoint_of_another_model_is_refused(single_rank: None, tmp_path: Path) -> None:
    source, _ = make_source(tmp_path / "moe")
    config, out = source / "config.yaml", tmp_path / "out"
    for settings, said in (
        (("moe.num_experts=16",), "decoder.layers.mlp.router.weight is [8, 32], not [16, 32]"),
        (("chain.iterations=2",), "it has no decoder.layers.mlp.later_routers.0.weight"),
        (("moe.layer_freq=[1,1]",), "it has no decoder.layers.0.mlp.router.weight"),
    ):
        config.write_text(dump(resolve(read(source / "base.yaml"), settings)))
        with pytest.raises(ValueError, match=r"is not of the config's model") as raised:
            upcycle(source, out, plan(config, out, 3))
        assert said in str(raised.value)
    assert not out.exists()
