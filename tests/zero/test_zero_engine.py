"""DeepSpeed over Megatron's groups against one process: the same rows must give the same gradients in any layout.

Gradients are compared, not only what AdamW makes of them: it forgives a wrong factor.
"""

import contextlib
import io
import pkgutil
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from engine_build import Trace, joined, make_engine, micro_batches, take_steps, use_groups
from model_build import errors, make_config, make_gpt
from ranks import run_ranks

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.config.settings import OptimizerSettings
from coe_megatron.model import coe_layer_spec
from coe_megatron.model.layer import coe_layers
from coe_megatron.zero import engine as zero
from coe_megatron.zero import expert_groups
from coe_megatron.zero import optimizer_states as states

STEPS = 3


def test_the_places_where_a_loss_is_scaled_exist() -> None:
    """The list in the engine's docstring names them by module and function."""
    assert zero.__doc__ is not None
    places = re.findall(r"^\* `([\w.]+)`", zero.__doc__, re.MULTILINE)
    assert len(places) == 9
    for place in places:
        assert pkgutil.resolve_name(f"coe_megatron.{place}") is not None


@pytest.fixture(scope="module")
def runs() -> dict[str, dict[str, list]]:
    """By layout and kind of run: what every rank has to tell. A layout's ranks are started once for all its runs."""
    return {
        "one": by_kind(run_ranks(train, 1, ["micro 8", "micro 4", "micro 2", "bf16 8", "promises"])),
        "dp2": by_kind(run_ranks(train, 2, ["micro 4", "micro 2"])),
        "ep2": by_kind(run_ranks(train, 2, ["micro 4", "bf16 2", *MISTAKES], expert_model_parallel_size=2)),
        "ep2dp2": by_kind(run_ranks(train, 4, ["micro 2"], expert_model_parallel_size=2)),
    }


def train(kinds: list[str]) -> dict:
    return {kind: run(kind) for kind in kinds}


def run(kind: str) -> Any:
    name, _, size = kind.partition(" ")
    if name == "micro":
        return take_steps(make_engine(int(size)), 0, STEPS)
    return {"bf16": train_in_bf16, "promises": try_promises, **MISTAKES}[name](*map(int, size.split()))


def by_kind(ranks: list[dict]) -> dict[str, list]:
    return {kind: [rank[kind] for rank in ranks] for kind in ranks[0]}


def forget_experts() -> Trace:
    """Experts averaged over all ranks, as DeepSpeed does when it does not know them."""

    def spoil(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            parameter.allreduce = True  # type: ignore[attr-defined]

    return take_steps(make_engine(spoil=spoil), 0, 1)


def weigh_rows_equally() -> Trace:
    """The mean of the micro-batches' means instead of the mean over tokens."""
    return take_steps(make_engine(), 0, 1, mean_of_means=True)


MISTAKES = {"forgotten": forget_experts, "unweighted": weigh_rows_equally}
LAYOUTS = [("one", 4), ("one", 2), ("dp2", 4), ("dp2", 2), ("ep2", 4), ("ep2dp2", 2)]


@pytest.mark.ranks
@pytest.mark.parametrize(("layout", "size"), LAYOUTS)
def test_gradients_norms_and_losses_equal_one_process(runs: dict, layout: str, size: int) -> None:
    """Accumulation 1, 2, 4 and 2 or 4 ranks: every gradient to 1e-5 of its largest entry, with clipping in between."""
    (whole,), ranks = runs["one"]["micro 8"], runs[layout][f"micro {size}"]
    found = joined(ranks, layout)
    worst = errors(found.gradients, whole.gradients)
    assert max(worst.values()) < 1e-5, worst
    assert ranks[0].norms == pytest.approx(whole.norms, rel=1e-5)
    assert ranks[0].losses == pytest.approx(whole.losses, rel=1e-5)
    # Where a gradient is near zero AdamW's first steps are its sign: weights are looser than gradients.
    assert max(errors(found.weights, whole.weights).values()) < 1e-3


def compare_norms() -> list[tuple[float, float]]:
    """Ours and DeepSpeed's norms of the same gradients, in stages 1 and 2 with experts replicated, then with TP."""
    found = []
    for tensor, stage in ((1, 1), (1, 2), (2, 1)):
        use_groups(tensor=tensor, expert=2)
        engine = make_engine(stage=stage)
        optimizer, ours = engine.optimizer, engine.optimizer.scaled_global_norm

        def both(optimizer: Any = optimizer, ours: Any = ours) -> torch.Tensor:
            found.append((float(ours()), float(type(optimizer).scaled_global_norm(optimizer))))
            return ours()

        optimizer.scaled_global_norm = both
        take_steps(engine, 0, 2)
    return found


@pytest.mark.ranks
def test_the_norm_by_one_all_reduce_is_deepspeeds() -> None:
    for norms in run_ranks(compare_norms, 4, expert_model_parallel_size=2):
        assert len(norms) == 6
        for ours, theirs in norms:
            assert ours == pytest.approx(theirs, rel=3e-7) and ours > 0.1


@pytest.mark.ranks
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_notices_a_mistake(runs: dict, mistake: str) -> None:
    (whole,), ranks = runs["one"]["micro 8"], runs["ep2"][mistake]
    assert max(errors(joined(ranks, "ep2").gradients, whole.gradients).values()) > 1e-2


@pytest.mark.ranks
def test_replicas_of_an_expert_stay_equal_and_experts_differ(runs: dict) -> None:
    weights = [rank.weights for rank in runs["ep2dp2"]["micro 2"]]
    for name in (name for name in weights[0] if ".experts." in name):
        assert torch.equal(weights[0][name], weights[2][name]), name
        assert not torch.equal(weights[0][name], weights[1][name]), name


@pytest.mark.ranks
def test_bf16_keeps_fp32_masters_and_sums(runs: dict) -> None:
    """Two ranks with accumulation against one process without: equal but for the rounding of bf16 gradients."""
    ((whole, _),), ranks = runs["one"]["bf16 8"], runs["ep2"]["bf16 2"]
    found = joined([trace for trace, _ in ranks], "ep2")
    assert max(errors(found.gradients, whole.gradients).values()) < 5e-2
    # AdamW's first step is the sign of each gradient: rounding moves the norm of the second by a percent.
    assert ranks[0][0].norms == pytest.approx(whole.norms, rel=2e-2)
    assert ranks[0][0].losses == pytest.approx(whole.losses, rel=3e-3)
    assert all(rounded for _, rounded in ranks)


def train_in_bf16(size: int) -> tuple[Trace, bool]:
    """The trace, and whether the weights are the masters rounded, where the masters are finer."""
    engine = make_engine(size, precision="bf16")
    trace = take_steps(engine, 0, STEPS)
    masters = {
        name: states.read(engine, parameter, states.MASTER) for name, parameter in engine.module.named_parameters()
    }
    rounded = all(torch.equal(trace.weights[name], master.bfloat16()) for name, master in masters.items())
    return trace, rounded and any(not torch.equal(trace.weights[name].float(), masters[name]) for name in masters)


@pytest.mark.ranks
def test_small_promises(runs: dict) -> None:
    (found,) = runs["one"]["promises"]
    assert found["printed"] == ""
    assert found["moments"] == 0.0, "optimizer states exist before the first step"
    assert found["moved without a rate"] == 0.0
    assert found["moved"] > 0
    assert found["norm of a loss that is not finite"] == float("inf")
    assert found["moved by it"] == 0.0
    assert found["modules"] == found["modules of the model"], "nothing stays in the model"


def try_promises() -> dict:
    modules: list[int] = []
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        engine = make_engine(8, spoil=lambda model: modules.append(len(list(model.modules()))))
    embedding = engine.module.embedding.word_embeddings.weight
    found = {"printed": printed.getvalue(), "modules of the model": modules[0]}
    found["modules"] = len(list(engine.module.modules()))
    found["moments"] = float(states.read(engine, embedding, "exp_avg").abs().max())
    found["moved without a rate"] = moved(engine, embedding, rate=0.0)
    found["moved"] = moved(engine, embedding, rate=1e-3)
    found["moved by it"] = moved(engine, embedding, rate=1e-3, factor=float("inf"))
    found["norm of a loss that is not finite"] = float(zero.gradient_norm(engine))
    return found


def moved(engine, weight: torch.nn.Parameter, rate: float, factor: float = 1.0) -> float:
    """How far one step moves a weight."""
    before = weight.detach().clone()
    zero.set_lr(engine, rate)
    for batch in micro_batches(0, 8):
        tokens = batch["tokens"]
        losses = engine(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None, labels=batch["labels"])
        zero.backward(engine, losses.sum() * factor / batch["total"])
        engine.step()
    return float((weight - before).abs().max())


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("decay_routers", [True, False])
def test_weight_decay_spares_vectors_and_by_option_routers(decay_routers: bool) -> None:
    config = make_config(num_layers=2, expert_model_parallel_size=1)
    model = make_gpt(config, coe_layer_spec(config, ChainSettings(iterations=2)), vocab=64)
    experts = [parameter for name, parameter in model.named_parameters() if ".experts." in name]
    for expert in experts:
        expert.allreduce = False  # type: ignore[attr-defined]
    settings = OptimizerSettings(weight_decay=0.1, decay_routers=decay_routers)
    groups = {(g["moe"], g["weight_decay"]): set(g["params"]) for g in zero._parameter_groups(model, settings, False)}
    assert groups.keys() == {(False, 0.0), (False, 0.1), (True, 0.1)}
    assert groups[True, 0.1] == set(experts) and all(map(expert_groups.is_expert, experts))
    spared = {name for name, parameter in model.named_parameters() if parameter in groups[False, 0.0]}
    vectors = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
    routers = {name for name, parameter in model.named_parameters() if "router" in name and parameter.ndim == 2}
    assert len(routers) == 4 and "decoder.final_layernorm.weight" in vectors
    assert spared == vectors | (set() if decay_routers else routers)


@pytest.mark.usefixtures("single_rank")
def test_stage_3_gathers_a_layer_once_a_pass_whatever_its_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def noted(self: PartitionedParameterCoordinator, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        fetched.append(type(module).__name__)
        fetch(self, module, *args, **kwargs)

    monkeypatch.setattr(PartitionedParameterCoordinator, "fetch_sub_module", noted)
    engine = make_engine(8, stage=3, chain=ChainSettings(iterations=3), layers=2)
    take_steps(engine, 0, 1)
    assert fetched.count("CoELayer") == 2 * 2, "each of two layers once forward and once backward"
    inside = {type(module).__name__ for layer in coe_layers(engine.module) for module in layer.modules()} - {"CoELayer"}
    assert {"CoERouter", "GroupedExperts"} <= inside
    assert not {"CoERouter", "GroupedExperts", "SharedExpertMLP"} & set(fetched)


@pytest.mark.usefixtures("single_rank")
def test_a_step_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(8, stage=3)

    def refused(*arguments: Any, **_: Any) -> None:
        raise AssertionError(f"a step starts {arguments}")

    monkeypatch.setattr(subprocess, "Popen", refused)
    take_steps(engine, 0, 1)


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(stage: int) -> None:
    engine = make_engine(8, stage=stage)
    before = [states.read(engine, p, states.MASTER).clone() for p in engine.module.parameters()]
    trace = take_steps(engine, 0, 1, spoil_loss=float("nan"))
    assert not trace.norms[0] < float("inf")
    after = [states.read(engine, p, states.MASTER) for p in engine.module.parameters()]
    assert all(map(torch.equal, before, after)) and states.steps(engine) == 0


@pytest.mark.usefixtures("single_rank")
def test_native_json_is_merged_over_ours(tmp_path: Path) -> None:
    native = tmp_path / "deepspeed.json"
    native.write_text('{"zero_optimization": {"round_robin_gradients": true}, "wall_clock_breakdown": true}')
    engine = make_engine(8, stage=2, native=str(native))
    assert engine.zero_round_robin_gradients() and engine.zero_overlap_comm() and engine.wall_clock_breakdown()
    assert engine.zero_optimization_stage() == 2 and engine.gradient_clipping() == 0.1, "what it does not say is ours"
    native.write_text('{"zero_optimization": {"overlap_comm": false}}')
    assert not make_engine(8, stage=2, native=str(native)).zero_overlap_comm()
    native.write_text('{"zero_optimization": {"overlap_com": true}}')
    with pytest.raises(ValueError, match=r"^zero.deepspeed is .*: overlap_com: Extra inputs are not permitted$"):
        make_engine(8, stage=2, native=str(native))
