"""Simulates a run on nodes that fail: its goodput as a distribution, and the interval of saves that is best.

Nodes fail independently at a constant rate (exponential times between failures), and jobs are preempted at another. A
failure loses the steps since the last complete checkpoint; then it is noticed, and the job starts again (with a spare
node at once, otherwise when a node is repaired, or elastically with fewer nodes), loads, and warms up, all of which can
fail too. A save stops the run for its foreground part; with background saving the checkpoint is complete only some time
after, and is lost if the run fails before. `replay` takes times between stops that are known (bench_goodput.py).

Young (1974) and Daly (2006) give the interval of saves from the mean time between failures M and the foreground part of
a save d: sqrt(2 d M) and, for d < 2 M, sqrt(2 d M) (1 + sqrt(d / 2M) / 3 + d / 18M) - d. `best_interval` takes the
simulated best of a grid around them instead, since they know neither background saving nor what a start costs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import sqrt

import numpy as np

from coe_megatron.estimate.machine import Failures, Machine
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.estimate.run_time import SaveSeconds

_LONGEST = 100  # times the seconds of all steps; then a run is given up
_NEVER = 1e15  # seconds
_GRID = tuple(2.0 ** (power / 2) for power in range(-4, 5))  # times Young's interval


@dataclass(frozen=True)
class Job:
    """What is to be done.

    Attributes:
        steps: of the run.
        step: seconds of a step on all nodes.
        nodes: that it runs on.
        save: seconds that a save stops the run.
        written: seconds after that until the checkpoint is complete; 0 without background saving.
        load: seconds to read a checkpoint.
        interval: steps between saves.
    """

    steps: int
    step: float
    nodes: int
    save: float
    written: float
    load: float
    interval: int

    @classmethod
    def of(cls, run: RunShape, machine: Machine, step: float) -> "Job":
        """The job of a run whose steps take so many seconds; checkpoints go to the machine's disk."""
        training, save = run.config.training, SaveSeconds.of(run, machine)
        return cls(
            steps=training.steps,
            step=step,
            nodes=-(-run.layout.world_size // run.ranks_on_a_node),
            save=save.stopped,
            written=save.written,
            load=save.loaded,
            interval=training.save_every,
        )


@dataclass(frozen=True)
class Goodput:
    """Of simulated runs; one that takes a hundred times as long as its steps is given up.

    Attributes:
        fractions: of each run, the time of its steps without failures and saves over its whole time, sorted.
        failures: mean number of failures and preemptions of a run.
        seconds: mean whole time.
        lost: mean seconds by cause: `saves`, `repeated` steps, `down` until the job runs, at first and after each stop,
            `slower` with fewer nodes.
    """

    fractions: tuple[float, ...]
    failures: float
    seconds: float
    lost: dict[str, float]

    def quantile(self, part: float) -> float:
        """A quantile of the goodput."""
        return float(np.quantile(self.fractions, part))

    @property
    def mean(self) -> float:
        """The mean goodput."""
        return sum(self.fractions) / len(self.fractions)


def simulate(job: Job, failures: Failures, runs: int = 400, seed: int = 1) -> Goodput:
    """Simulate runs with different failures; the same seed gives the same ones."""
    return _goodput([_Run(job, failures, np.random.default_rng((seed, number))).run() for number in range(runs)])


def replay(job: Job, failures: Failures, stops: Iterator[float]) -> Goodput:
    """The run that fails so many seconds after each of its starts, and never again when they are used up."""
    return _goodput([_Run(job, failures, _Known(stops)).run()])


def _goodput(found: "list[_Run]") -> Goodput:
    job, runs = found[0].job, len(found)
    return Goodput(
        tuple(sorted(run.done * job.step / run.now for run in found)),
        sum(run.stops for run in found) / runs,
        sum(run.now for run in found) / runs,
        {name: sum(run.lost[name] for run in found) / runs for name in found[0].lost},
    )


def young(save: float, between: float) -> float:
    """Young's interval between saves, in seconds."""
    return sqrt(2 * save * between)


def daly(save: float, between: float) -> float:
    """Daly's interval between saves, in seconds; the time between failures if a save takes more than twice as long."""
    if save >= 2 * between:
        return between
    part = save / (2 * between)
    return young(save, between) * (1 + sqrt(part) / 3 + part / 9) - save


def between_stops(job: Job, failures: Failures) -> float:
    """Mean seconds between stops of the job, of either cause, on all its nodes."""
    return 1 / (job.nodes / failures.between_failures + _preemptions(failures))


def _preemptions(failures: Failures) -> float:
    """Per second."""
    return 1 / failures.between_preemptions if failures.between_preemptions else 0.0


def best_interval(job: Job, failures: Failures) -> int:
    """The number of steps between saves with the highest mean goodput, of a grid around Young's interval.

    All are tried on the same failures.
    """
    seconds = young(max(job.save, 1e-3), between_stops(job, failures))
    tried = sorted({min(job.steps, max(1, round(factor * seconds / job.step))) for factor in _GRID})
    return max(tried, key=lambda steps: simulate(replace(job, interval=steps), failures, runs=100).mean)


@dataclass(frozen=True)
class _Known:
    """Takes the place of random numbers: known seconds between stops, all of which are failures."""

    stops: Iterator[float]

    def exponential(self, _mean: float) -> float:
        """The next one."""
        return next(self.stops, _NEVER)

    def random(self) -> float:
        """Less than the part of failures."""
        return 0.0


@dataclass
class _Run:
    """A simulated run: its clock, and what is done."""

    job: Job
    failures: Failures
    random: np.random.Generator | _Known
    now: float = 0.0
    done: int = 0
    saved: int = 0
    saving: tuple[float, int] = (0.0, 0)  # when the last checkpoint is complete, and its step
    stops: int = 0
    saves: float = 0.0
    down: float = 0.0
    slower: float = 0.0
    in_repair: list[float] = field(default_factory=list)  # when nodes can be used again

    def run(self) -> "_Run":
        """Until the last step is saved, or too long."""
        longest = _LONGEST * self.job.steps * self.job.step
        while self.now < longest:
            nodes = self._nodes()
            stop, is_failure = self._next_stop(nodes)
            if self._starts_until(stop) and self._works_until(stop, nodes):
                return self
            self.stops += 1
            self.done = self.saved = self.saving[1] if self.saving[0] <= stop else self.saved
            self.saving = (stop, self.saved)  # what was being written is lost
            self._waits_for_nodes(stop, is_failure)
        return self

    @property
    def lost(self) -> dict[str, float]:
        """Seconds by cause."""
        known = {"saves": self.saves, "down": self.down, "slower": self.slower}
        return known | {"repeated": self.now - self.done * self.job.step - sum(known.values())}

    def _nodes(self) -> int:
        """Nodes that the run can have now."""
        self.in_repair = sorted(ready for ready in self.in_repair if ready > self.now)
        return min(self.job.nodes, self.job.nodes + self.failures.spare_nodes - len(self.in_repair))

    def _next_stop(self, nodes: int) -> tuple[float, bool]:
        """When the next failure or preemption of a job that starts now is, and whether it is a failure."""
        failures = nodes / self.failures.between_failures
        rate = failures + _preemptions(self.failures)
        return self.now + self.random.exponential(1 / rate), self.random.random() < failures / rate

    def _starts_until(self, stop: float) -> bool:
        """Processes, checkpoint and first steps until a stop; whether the job runs before."""
        began, own = self.now, self.failures
        ready = began + own.start + self.job.load * (self.saved > 0) + own.warm_up
        self.now = min(ready, stop)
        self.down += self.now - began
        return ready < stop

    def _works_until(self, stop: float, nodes: int) -> bool:
        """Steps and saves until a stop; whether the run is done before."""
        job, pace = self.job, self.job.step * self.job.nodes / nodes
        while True:
            goal = min(job.steps, (self.done // job.interval + 1) * job.interval)
            reached = min(goal, self.done + int((stop - self.now) / pace))
            self.slower += (reached - self.done) * (pace - job.step)
            self.now += (reached - self.done) * pace
            self.done = reached
            begun = max(self.now, self.saving[0])  # one save is written at a time
            stopped = job.save + job.written * (goal == job.steps)  # the run ends when its last one is written
            if reached < goal or begun + stopped > stop:
                self.now = stop
                return False
            if self.saving[0] <= begun:
                self.saved = self.saving[1]
            self.saves += begun + stopped - self.now
            self.now = begun + stopped
            self.saving = (begun + job.save + job.written, goal)
            if goal == job.steps:
                return True

    def _waits_for_nodes(self, stop: float, is_failure: bool) -> None:
        """The clock when the job starts again, on as many nodes as there are."""
        own, before = self.failures, self.now
        if is_failure:
            self.in_repair.append(stop + own.repair)
        self.now += own.notice * is_failure + own.requeue
        if (missing := self.job.nodes - self._nodes()) and not (own.elastic and missing < self.job.nodes):
            self.now = self.in_repair[missing - 1]
        self.down += self.now - before
