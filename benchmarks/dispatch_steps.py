"""What one rank of bench_dispatch.py does.

It builds each variant as a pretraining run of its own and times their steps in turn, so that other load on the machine
affects all of them equally; then it traces the collectives of one more step of each.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from collective_trace import CollectiveTrace

from coe_megatron.config import RunConfig
from coe_megatron.config.load import parse
from coe_megatron.distributed import process_groups
from coe_megatron.distributed.environment import DistributedEnv
from coe_megatron.distributed.rendezvous import rendezvous
from coe_megatron.estimate.run_estimate import vocabulary
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.training.loop import Pretraining, _Clock
from coe_megatron.training.metrics import CompositeMetrics, Values
from coe_megatron.training.progress import Progress
from coe_megatron.training.signals import StopRequest
from coe_megatron.training.watchdog import HangDetector

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Variant:
    """A run of this rank that is trained in turns.

    Attributes:
        seconds: of every timed step, a list for each turn.
        losses: of all steps.
    """

    def __init__(self, config: RunConfig, env: DistributedEnv, device: torch.device) -> None:
        shape = RunShape.of(config, vocabulary(config, data_needed=True), env.world_size)
        watch = HangDetector(Path(config.output), env.rank, None, lambda _status, _line: None)
        process_groups.seed_weights(config.training.seed)
        self._run = Pretraining(shape, device, StopRequest(), watch, env.node_rank, None)
        self._run.writer, self._run.progress = CompositeMetrics(), Progress(0, config.training.steps, visible=False)
        self.seconds: list[list[float]] = []
        self.losses: list[float] = []

    def turn(self, steps: int, clock: Callable[[], float]) -> list[float]:
        """Train some steps; returns the seconds of each."""
        seconds = []
        self._begin_turn()
        for _ in range(steps):
            began = clock()
            self.losses.append(self._run._train_step(self._run.state.step)[0])
            seconds.append(clock() - began)
        return seconds

    def trace(self) -> dict[str, Any]:
        """The collectives of one more step, those of logging it, and the bytes that left the host meanwhile.

        And the loads of experts in that step, for each layer and iteration.
        """
        self._begin_turn()
        before, clock, logged = _sent_by_host(), _Clock(self._run.state), _Kept()
        with CollectiveTrace() as of_step:
            loss, _ = self._run._train_step(self._run.state.step)
        self._run.writer = CompositeMetrics([logged])
        with CollectiveTrace() as of_log:
            self._run._log(loss, clock)  # to no disk
        sent = _sent_by_host() - before
        found = {"step": [*map(asdict, of_step.calls)], "log": [*map(asdict, of_log.calls)], "sent_by_host": sent}
        return found | {"loads": [each["load"] for each in logged.values["routing"]]}

    def _begin_turn(self) -> None:
        """Seed dropout, since all variants draw from the same generators, and wait for the other ranks."""
        process_groups.seed_dropout(self._run.config.training.seed + self._run.state.step)
        torch.distributed.barrier()


class _Kept:
    """Metrics that keep the last values in memory."""

    values: Values

    def write(self, values: Values) -> None:
        self.values = values

    def rewind(self, step: int) -> None:
        """Nothing is stored."""

    def close(self) -> None:
        """Nothing is open."""


def run_rank(plan: dict[str, Any]) -> None:
    """Take part in the measurement as the rank that the environment names; rank 0 writes the result.

    Args:
        plan: `configs` of the variants, which differ in nothing that concerns process groups; `warm_up` steps of each;
            `rounds` of `steps`; the `clock`; and the file of the `result`.
    """
    env = DistributedEnv.from_environment(os.environ)
    configs = [parse(config) for config in plan["configs"]]
    device = process_groups.start(configs[0].parallel, configs[0].training.seed, env, store=rendezvous(env))
    variants = [Variant(config, env, device) for config in configs]
    _take_turns(variants, plan, visible=env.rank == 0)
    results = [{"seconds": each.seconds, "losses": each.losses, **each.trace()} for each in variants]
    if env.rank == 0:
        Path(plan["result"]).write_text(json.dumps(results))
    process_groups.stop()


def _take_turns(variants: list[Variant], plan: dict[str, Any], visible: bool) -> None:
    """Train all variants for some steps, then time their turns; every other round goes backwards."""
    rounds, steps, clock = plan["rounds"], plan["steps"], CLOCKS[plan["clock"]]
    for variant in variants:
        variant.turn(plan["warm_up"], clock)
    progress, turns = Progress(0, rounds * len(variants), visible), 0
    for number in range(rounds):
        for which in range(len(variants))[:: -1 if number % 2 else 1]:
            seconds = variants[which].turn(steps, clock)
            variants[which].seconds.append(seconds)
            turns += 1
            progress.step(turns, {"variant": which + 1, "seconds": statistics.median(seconds)})
    progress.close()


def _sent_by_host() -> int:
    counters = psutil.net_io_counters(pernic=True)
    return sum(counter.bytes_sent for name, counter in counters.items() if name != "lo")
