"""Predicts published runs from data sheets, as a sanity check of `estimate.step_time`: nothing is fitted to them.

    python benchmarks/published_runs.py

* Mixtral 8x22B and Qwen2-57B-A14B in bf16 on H100, with Transformer Engine: the share of the peak that arXiv 2504.14960
  reports for Megatron-Core. The interleaving of the pipeline is not known, so there are two predictions.
* DeepSeek-V3 on 2,048 H800 (arXiv 2412.19437): 180,000 GPU hours for 10^12 tokens, in steps of 15,360 sequences. It
  computes in FP8 and overlaps two micro-batches (DualPipe), which this model does not know. An H800 is an H100 whose
  NVLink carries 160 GB/s. 61 layers do not divide into 16 stages: 64 are predicted, and 61/64 of their time is taken.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from coe_megatron.config import parse
from coe_megatron.estimate.machine import Link, Machine, Way, machine
from coe_megatron.estimate.run_estimate import RunEstimate, estimate
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.text import aligned, duration


@dataclass(frozen=True)
class Published:
    """A published run.

    Attributes:
        settings: sections of its config.
        interleaved: parts of a pipeline stage that are predicted.
        mfu: the share of the peak that was reported; None if seconds were.
        seconds: of a step.
        part: of the predicted time that is the published model's.
        slow_nvlink: bytes per second of NVLink; None for that of an H100.
    """

    settings: dict[str, dict[str, Any]]
    interleaved: tuple[int, ...] = (1,)
    mfu: float | None = None
    seconds: float | None = None
    part: float = 1.0
    slow_nvlink: float | None = None
    source: str = field(default="arXiv 2504.14960")


RUNS = {
    "Mixtral 8x22B, 128 GPUs": Published(
        {
            "model": {
                "num_layers": 56, "hidden_size": 6144, "num_attention_heads": 48, "num_query_groups": 8,
                "kv_channels": 128, "seq_length": 4096, "vocab_size": 32768,
            },
            "moe": {"num_experts": 8, "topk": 2, "ffn_hidden_size": 16384, "num_shared_experts": 0},
            "parallel": {"tensor": 2, "expert": 8, "pipeline": 8, "world_size": 128},
            "training": {"global_batch": 256},
        },
        interleaved=(1, 7),
        mfu=0.493,
    ),
    "Qwen2-57B-A14B, 64 GPUs": Published(
        {
            "model": {
                "num_layers": 28, "hidden_size": 3584, "num_attention_heads": 28, "num_query_groups": 4,
                "kv_channels": 128, "qkv_bias": True, "seq_length": 4096, "vocab_size": 151936,
            },
            "moe": {
                "num_experts": 64, "topk": 8, "ffn_hidden_size": 2560, "num_shared_experts": 8,
                "shared_expert_gate": True,
            },
            "parallel": {"tensor": 2, "expert": 4, "pipeline": 4, "world_size": 64},
            "training": {"global_batch": 256},
        },
        interleaved=(1, 7),
        mfu=0.39,
    ),
    "DeepSeek-V3, 2,048 GPUs": Published(
        {
            "model": {
                "num_layers": 64, "hidden_size": 7168, "num_attention_heads": 128, "ffn_hidden_size": 18432,
                "seq_length": 4096, "vocab_size": 129280,
                "mla": {
                    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64,
                    "v_head_dim": 128,
                },
            },
            "moe": {
                "num_experts": 256, "topk": 8, "ffn_hidden_size": 2048, "num_shared_experts": 1,
                "score_function": "sigmoid", "num_groups": 8, "group_topk": 4, "dispatcher": "deduplicated",
                "layer_freq": [0] * 3 + [1] * 61,
            },
            "parallel": {"expert": 64, "pipeline": 16, "world_size": 2048},
            "training": {"global_batch": 15360},
        },
        seconds=180_000 * 3600 / 2048 * 15_360 * 4096 / 1e12,
        part=61 / 64,
        slow_nvlink=1.6e11,
        source="arXiv 2412.19437",
    ),
}  # fmt: skip


def predicted(run: Published, parts: int) -> RunEstimate:
    """Its cost on a machine from data sheets, as a MoE without iterations in bf16."""
    sections = {name: dict(values) for name, values in run.settings.items()}
    sections["training"] |= {"micro_batch": 1, "precision": "bf16"}
    sections["parallel"] |= {"virtual_pipeline": parts, "ranks_per_node": 8}
    config = parse({"output": "unused", "chain": {"iterations": 1}, "zero": {"stage": 1}, **sections})
    vocabulary = config.model.vocab_size
    assert vocabulary is not None
    return estimate(RunShape.of(config, vocabulary), machine=_machine(run.slow_nvlink))


def _machine(nvlink: float | None) -> Machine:
    found = machine("h100")
    if nvlink is None:
        return found

    def slower(way: Way) -> Way:
        return replace(way, bandwidth=nvlink)

    inside = found.inside
    ways = slower(inside.all_to_all), slower(inside.ring), slower(inside.point_to_point)
    return replace(found, inside=Link(*ways))


def main() -> None:
    """Print the table, and where the predicted time goes."""
    rows, parts = [["run", "pipeline", "predicted", "published", "time", "source"]], []
    for name, run in RUNS.items():
        for count in run.interleaved:
            cost = predicted(run, count)
            assert cost.time is not None and cost.mfu is not None
            seconds = run.part * cost.time.total
            reported = seconds * cost.mfu / run.mfu if run.mfu is not None else run.seconds
            assert reported is not None
            shown = f"{cost.mfu:.1%} of the peak", f"{run.mfu:.1%}" if run.mfu else duration(reported)
            if run.mfu is None:
                shown = duration(seconds), shown[1]
            rows.append([name, f"{count} parts" if count > 1 else "-", *shown, f"{seconds / reported:.2f}", run.source])
            parts += [f"\n{name}, {count} part{'s' * (count > 1)}:", *cost.time.bars()]
    print("\n".join([*aligned(rows, "<<>>><"), *parts]))


if __name__ == "__main__":
    main()
