"""Runs of a study that nobody has trained: their folders, as training would leave them, with losses made up."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from coe_megatron.config import RunConfig
from coe_megatron.study.plan.arms import Run


def leave(run: Run, loss: float = 5.0, outcome: str = "finished", attempts: int = 1, **changes: Any) -> Path:
    """The folder of a run; `changes` are keys of its last line in metrics.jsonl."""
    folder, config = Path(run.config.output), run.config
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps(asdict(config)))  # is YAML too, and quicker
    record = {"attempts": [{"outcome": "died"}] * (attempts - 1) + [{"outcome": outcome, "began": "2000"}]}
    (folder / "run.json").write_text(json.dumps(record))
    lines = list(_lines(config, loss, np.random.default_rng(run.seed)))
    lines[-1] |= changes
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def leave_all(runs: list[Run], loss: Callable[[Run], float]) -> None:
    """All runs of a study, finished."""
    for run in runs:
        leave(run, loss(run))


def _lines(config: RunConfig, loss: float, random: np.random.Generator) -> Iterator[dict[str, Any]]:
    training, every = config.training, config.training.evaluate_every
    yield {"step": 0, "tokens": 0, "valid_loss": 10.0}
    for step in [*range(every // 2, training.steps, every // 2), training.steps]:
        last = step == training.steps
        routing = list(_routing(config, random, last))
        line: dict[str, Any] = {
            "step": step,
            "tokens": step * 60,
            "train_loss": loss * (2 - step / training.steps) - 0.1,
            "step_seconds": 0.5 + random.random() / 10,
            "tokens_per_second": 900.0,
            "tflops": 0.01,
            "memory": {"peak": 400 * 2**20 + config.chain.iterations * 2**21},
            "routing_entropy": 1.5 + 0.3 * random.random(),
            "routing_load_max_over_mean": 1 + random.random(),
            "routing_dead_experts": float(random.integers(2)),
            "routing_dropped": 0.0,
            "routing": routing,
        }
        if config.chain.iterations > 1:
            line["routing_overlap"] = 0.2 + 0.1 * random.random()
        if last or step % every == 0:
            line["valid_loss"] = loss * (2 - step / training.steps)
        yield line


def _routing(config: RunConfig, random: np.random.Generator, pairs: bool) -> Iterator[Mapping[str, Any]]:
    experts = config.moe.num_experts
    for layer in range(1, config.model.num_layers + 1):
        for t in range(1, config.chain.iterations + 1):
            part: dict[str, Any] = {
                "layer": layer,
                "iteration": t,
                "load": random.dirichlet([4.0] * experts).tolist(),
                "overlap": None if t == 1 else 0.2,
                "state_norm": 1 + 0.2 * layer + 0.1 * t,
                "increment_over_state": 0.5 / t,
                "increment_norm": 2.0 / t,
            }
            if t > 1:
                part |= {"increment_cosines": [0.1 * layer] * (t - 1), "single_scale": 0.9 - 0.1 * t}
            if pairs and t > 1:
                part["pairs"] = random.poisson(5, (experts, experts)).tolist()
            yield part
