"""The predicted time of a step, by hand, and machine files."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT

from coe_megatron.cli.estimates import estimated
from coe_megatron.config import RunConfig, load, parse
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.closed_forms import forward_flops
from coe_megatron.estimate.load_imbalance import load_imbalance
from coe_megatron.estimate.machine import Machine, Rates, machine, machines
from coe_megatron.estimate.operations import Product, Rank
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.estimate.run_time import SaveSeconds, run_time
from coe_megatron.estimate.step_time import Costs, StepTime, idle_passes, step_time
from coe_megatron.estimate.traffic import Sent, group
from coe_megatron.scale.step_picture import _KINDS, draw_step

VOCABULARY = 512
H100 = machine("h100")
MODEL = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}
MLA = {"kv_lora_rank": 8, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8}
MOE = {"num_experts": 8, "topk": 2, "ffn_hidden_size": 16}


def config(**sections: Any) -> RunConfig:
    return parse(
        {
            "model": MODEL | sections.pop("model", {}),
            "moe": MOE | sections.pop("moe", {}),
            "training": {"global_batch": 32, "micro_batch": 2, "precision": "bf16"} | sections.pop("training", {}),
            **sections,
        }
    )


def shape(world_size: int = 1, **sections: Any) -> RunShape:
    return RunShape.of(config(**sections), VOCABULARY, world_size)


def products(run: RunShape) -> dict[str, float]:
    """FLOPs of a micro-batch's forward pass over all ranks of a replica, by kind."""
    found: dict[str, float] = {}
    for stage in range(run.layout.pipeline):
        for count, work, _ in Rank(run.stage_model(stage), run.stage_pass(stage)).parts():
            for each in work.products:
                found[each.kind] = found.get(each.kind, 0.0) + count * each.flops
    replicas = run.layout.tensor * run.layout.context
    return {kind: value * replicas for kind, value in found.items() if value}


SHAPES: list[dict[str, Any]] = [
    {},
    {"chain": {"iterations": 3}, "moe": {"num_shared_experts": 2, "shared_expert_gate": True}},
    {"chain": {"iterations": 2, "gating": "fixed"}, "model": {"num_query_groups": 2}},
    {"chain": {"iterations": 2, "latent": 16, "modulation_rank": 4}},
    {"model": {"mla": MLA}, "moe": {"layer_freq": 2}},
    {"model": {"mla": MLA | {"q_lora_rank": 8}}, "chain": {"iterations": 2, "layers": [2]}, "moe": {"topk": 1}},
    {"model": {"activation": "gelu"}},
    {"model": {"mla": MLA}, "parallel": {"tensor": 2, "expert": 2, "pipeline": 2}},
    {"parallel": {"context": 2, "expert": 4, "expert_tensor": 2}, "moe": {"num_shared_experts": 1}},
]


@pytest.mark.parametrize("given", SHAPES)
def test_products_are_the_flops_of_the_closed_forms(given: dict[str, Any]) -> None:
    run = shape(8 if "parallel" in given else 1, **given)
    tokens = run.config.training.micro_batch * run.model.seq_length
    wanted = {kind: float(value * tokens) for kind, value in asdict(forward_flops(run.model)).items() if value}
    assert products(run) == pytest.approx(wanted)


def test_a_product_takes_as_long_as_its_flops_or_its_bytes() -> None:
    costs = Costs(shape(), H100)
    wide = Product("dense", 4096, 4096, 4096)
    assert costs.product(wide) == pytest.approx(2 * 4096**3 / 6.92e14)
    thin = Product("dense", 1, 4096, 4096)  # reads its weights once
    assert costs.product(thin) == pytest.approx(2 * (4096**2 + 2 * 4096) / 2.68e12)
    assert costs.product(replace(wide, part=0.5, count=3)) == pytest.approx(1.5 * costs.product(wide))
    assert costs.product(replace(wide, in_fp32=True)) == pytest.approx(2 * 4096**3 / 4.69e13)


def test_rates_lie_between_measured_shapes() -> None:
    rates = Rates(rows=[10, 1000], widths=[10, 1000], rates=[[1e9, 1e10], [1e10, 1e11]])
    assert rates.at(10, 10) == pytest.approx(1e9)
    assert rates.at(100, 10) == pytest.approx(10**9.5)
    assert rates.at(100, 100) == pytest.approx(1e10)
    assert rates.at(1e6, 1e6) == pytest.approx(1e11)
    assert rates.at(5, 10) == pytest.approx(0.5e9)  # five rows take as long as ten


def test_a_collective_takes_the_slower_link() -> None:
    costs = Costs(shape(16, parallel={"world_size": 16, "expert": 8}), H100)
    inside, across = group(16, 8, 1, 8), group(16, 2, 8, 8)
    assert costs.collective("ring", Sent(36_000_000, 0), inside) == pytest.approx(1e-4 + 1.5e-5 + 6 * 2e-6)
    # Eight ranks send through eight adapters of 42.5 GB/s.
    assert costs.collective("ring", Sent(0, 42_500_000), across, 2) == pytest.approx(1e-3 + 2 * 2.5e-5)
    both = group(16, 16, 1, 8)
    assert costs.collective("all_to_all", Sent(360_000_000, 42_500_000), both) == pytest.approx(1e-3 + 2.5e-5 + 14e-6)
    assert costs.collective("ring", Sent(0, 0), group(16, 1, 1, 8)) == 0


def test_ranks_that_share_cores_slow_each_other_down() -> None:
    shared = replace(H100, cores=2, host=replace(H100.host, is_asynchronous=False))
    parallel = {"world_size": 4, "ranks_per_node": 8}
    four, alone = Costs(shape(4, parallel=parallel), shared), Costs(shape(1), shared)
    product = Product("dense", 256, 256, 256)
    assert four.product(product) == pytest.approx(2 * alone.product(product))
    assert (four.hides, alone.hides) == (False, True)
    times = step_time(four.run, shared).parts
    assert times["starts"] > 0 and times["gradients"] > 0


def test_ranks_that_wait_leave_their_cores_to_others() -> None:
    given = {"parallel": {"world_size": 4, "ranks_per_node": 4, "pipeline": 4}}
    own, shared, one = (Costs(shape(4, **given), replace(H100, cores=cores)) for cores in (4, 2, 1))
    # Of a pipeline's four stages one, two and three work at first and at last.
    assert [idle_passes(4, costs.slowdown) for costs in (own, shared, one)] == [3, 0.5 + 0.5 + 0.75, 0.25 + 0.5 + 0.75]
    assert [costs.waits(3.0) for costs in (own, shared, one)] == [2, 0.5, 0]


def test_the_modules_of_stage_3_take_the_host_time() -> None:
    machine = replace(H100, host=replace(H100.host, is_asynchronous=False))
    stages = [step_time(shape(zero={"stage": stage}), machine).parts["starts"] for stage in (1, 3)]
    passes = 2 * MODEL["num_layers"] * 16  # micro-batches
    assert stages[1] - stages[0] == pytest.approx(passes * 220 * H100.host.operation)


def test_a_pipeline_idles_and_its_parts_shorten_that() -> None:
    parts = {}
    for name, parallel in {"1": {"pipeline": 2}, "2": {"pipeline": 2, "virtual_pipeline": 2}}.items():
        found = step_time(shape(2, training={"micro_batch": 4}, parallel=parallel), H100).parts
        busy = sum(
            seconds for kind, seconds in found.items() if kind not in ("bubble", "gradients", "weights", "update")
        )
        parts[name] = found["bubble"] / busy
    assert parts == pytest.approx({"1": 1 / 8, "2": 1 / 16})


def test_what_hides_and_what_does_not() -> None:
    parallel = {"world_size": 16, "expert": 8, "ranks_per_node": 8}
    stages = {stage: step_time(shape(16, zero={"stage": stage}, parallel=parallel), H100).parts for stage in (1, 2, 3)}
    assert stages[1]["gradients"] > stages[2].get("gradients", 0)  # bf16 in stage 1 reduces after the backward pass
    assert stages[3].get("weights", 0) < stages[2]["weights"]
    plain, chunks = (
        step_time(shape(16, parallel=parallel, moe={"overlap_chunks": count, "topk": 4}), H100).parts["all_to_all"]
        for count in (1, 2)
    )
    assert plain != chunks
    busy, even = (step_time(shape(16, parallel=parallel), H100, imbalance) for imbalance in (1.5, 1.0))
    assert busy.parts["imbalance"] == pytest.approx(0.5 * (even.parts["experts"] + even.parts["all_to_all"]))
    assert busy.total - even.total == pytest.approx(busy.parts["imbalance"])


def test_recomputing_and_offloading_take_time() -> None:
    base = step_time(shape(), H100)
    assert step_time(shape(moe={"recompute": "layer"}), H100).parts["experts"] == pytest.approx(
        base.parts["experts"] * 4 / 3
    )
    offloaded = step_time(shape(zero={"stage": 1, "offload_optimizer": True}), H100)
    assert offloaded.parts["update"] > base.parts["update"]


@pytest.mark.parametrize("name", machines())
def test_packaged_machines_say_whether_they_are_measured(name: str) -> None:
    found = machine(name)
    if name == "cpu":
        assert found.measured and f"(measured {found.measured})" in found.name and found.bf16.peak is None
        return
    assert found.measured is None and "not measured" in found.name
    assert found.bf16.peak and found.bf16.products.at(1e9, 1e9) < found.bf16.peak
    assert found.across is not None


def write(folder: Path, change: str) -> str:
    (folder / "mine.yaml").write_text(
        f"base: {Path(load.__code__.co_filename).parents[1] / 'machines/h100.yaml'}\n{change}"
    )
    return str(folder / "mine.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("adapters: 0", "adapters is 0: it should be"),
        ("adaptors: 4", "adaptors"),
        ("memory: {bytes: [2, 1], rates: [1, 1]}", "memory.bytes of .*: its numbers must increase"),
        ("bf16: {products: {rows: [1, 2]}}", "bf16.products.rows of .* has 2 numbers: there are 1 rates for them"),
        ("inside: {ring: {bandwidth: -1}}", "inside.ring.bandwidth is -1"),
    ],
)
def test_mistakes_in_a_machine_file_are_named(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        machine(write(tmp_path, change))


def test_a_machine_file_inherits(tmp_path: Path) -> None:
    found = machine(write(tmp_path, "price: 2.5\ndescription: mine"))
    assert isinstance(found, Machine) and (found.price, found.memory, found.description) == (2.5, H100.memory, "mine")


def test_unknown_machines_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^x100: it must be a machine file, or one of a100, .*h200-ethernet$"):
        machine("x100")


def test_a_run_is_its_steps_evaluations_checkpoints_and_start() -> None:
    run = shape(2, training={"steps": 100, "evaluate_every": 40, "save_every": 30, "milestones": [50]})
    step = step_time(run, H100)
    found = run_time(run, H100, step, samples=9)
    assert found.steps == pytest.approx(100 * step.total)
    assert found.evaluations == pytest.approx(4 * 3 * step.forward)  # nine rows by two ranks with two at once
    assert 0 < step.forward < step.total
    assert found.checkpoints == pytest.approx(5 * SaveSeconds.of(run, H100).stopped)
    assert found.startup == H100.failures.start + H100.failures.warm_up
    assert found.total == pytest.approx(found.startup + found.steps + found.evaluations + found.checkpoints)


def test_the_busiest_rank_is_that_of_the_busiest_experts() -> None:
    even, uneven = [0.25] * 4, [0.5, 0.3, 0.1, 0.1]
    assert load_imbalance([even, uneven], 2) == pytest.approx((1 + 1.6) / 2)
    assert load_imbalance([uneven], 1) == pytest.approx(1)
    with pytest.raises(ConfigError, match="4 experts, and 3 expert-parallel ranks"):
        load_imbalance([even], 3)


def test_the_dry_run_takes_the_loads_of_a_run(tmp_path: Path) -> None:
    def imbalance(content: str) -> str:
        (tmp_path / "metrics.jsonl").write_text(content)
        try:
            return str(
                json.loads(estimated(given, "h100", None, tmp_path, None, True))["seconds_per_step"].get("imbalance")
            )
        except ConfigError as error:
            return str(error)

    given = parse(
        {
            "model": MODEL | {"vocab_size": 512},
            "moe": MOE,
            "training": {"global_batch": 32, "micro_batch": 2},
            "parallel": {"world_size": 8, "expert": 4},
        }
    )
    line = {"step": 1, "routing": [{"load": [1 / 8] * 8}]}
    assert imbalance(json.dumps(line) + "\n") == "None"
    line["routing"] = [{"load": [0.3, 0.1, *[0.1] * 6]}]
    assert float(imbalance(json.dumps(line) + "\n")) > 0
    for content in ("", "{}\n", '{"step": 1, "routing": [{"load": [0, 0]}]}\n'):
        assert imbalance(content).startswith(f"--routing is {tmp_path}: ")
    with pytest.raises(ConfigError, match="--routing needs --machine"):
        estimated(given, None, None, tmp_path, None, True)


def test_a_step_is_drawn_with_a_bar_for_each_part(tmp_path: Path) -> None:
    config = load(ROOT / "configs" / "64-gpus.yaml", ["data.path=nowhere"])
    picture = tmp_path / "new" / "step.png"
    text = estimated(config, "h100", None, None, picture, False)
    assert "time of a step" in text
    small, large = (
        picture.read_bytes(),
        draw_step(StepTime({name: 1.0 for _, names in _KINDS.values() for name in names}, 1.0), "all parts"),
    )
    assert small.startswith(b"\x89PNG") and len(large) > len(small) > 10_000
    with pytest.raises(ConfigError, match=r"^--picture needs --machine"):
        estimated(config, None, None, None, picture, False)
    with pytest.raises(ConfigError, match=r"--picture is .*: it is a folder"):
        estimated(config, "h100", None, None, tmp_path, False)
