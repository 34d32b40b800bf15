"""The starts of one run: when each of their steps was done, what this says about the run, and where time was lost.

Times are seconds of the wall clock. Those of steps are read from the event files for TensorBoard: each start has a file
of its own, which stays when the start is killed, and each step is on disk before the next one begins.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]

from coe_megatron.scale.failures import Job

WARM_UP = 3  # steps of a start that may take longer than others


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    Attributes:
        began: when its process was started.
        ended: when the process had ended or was killed.
        ready: when its first step began; None if it did not.
        first: the step from which it resumed, 0 for none.
        steps: when each step after `first` was done and logged.
    """

    began: float
    ended: float
    ready: float | None = None
    first: int = 0
    steps: tuple[float, ...] = ()

    @property
    def intervals(self) -> Iterator[tuple[int, float, float]]:
        """Of each step its number, and when it began and was done; a save between two steps belongs to the later."""
        if self.ready is not None:
            for step, (began, done) in enumerate(zip((self.ready, *self.steps), self.steps, strict=False), 1):
                yield self.first + step, began, done


@dataclass(frozen=True)
class Log:
    """All starts of a run.

    Attributes:
        attempts: in their order.
        completed: when the checkpoint of a step was complete.
        interval: steps between saves.
        background: whether they are written in the background.
        paused: seconds between starts that do not count.
    """

    attempts: tuple[Attempt, ...]
    completed: dict[int, float]
    interval: int
    background: bool
    paused: float = 0.0

    @classmethod
    def read(
        cls,
        folder: Path,
        processes: Sequence[tuple[float, float]],
        interval: int,
        background: bool,
        paused: float = 0.0,
    ) -> "Log":
        """Of a run's folder, whose processes began and ended at these times."""
        files = [events for path in sorted((folder / "tensorboard").glob("events.*")) if (events := _events(path))]
        attempts = [
            _attempt(began, ended, next((file for file in files if began <= file[0].wall_time <= ended), []))
            for began, ended in processes
        ]
        found = (folder / "checkpoints").glob("step-????????/complete.json")
        completed = {int(path.parent.name.removeprefix("step-")): path.stat().st_mtime for path in found}
        return cls(tuple(attempts), completed, interval, background, paused)

    def offset(self) -> float:
        """Mean seconds from the last step before a save until its checkpoint is complete."""
        return statistics.fmean(self._offsets())

    def _offsets(self) -> list[float]:
        """Of the checkpoints between two steps, each made by the last start that came to its step."""
        found = []
        for step, complete in self.completed.items():
            if not step % self.interval:
                done = [
                    done
                    for attempt in self.attempts
                    for number, _, done in attempt.intervals
                    if number == step and done <= complete
                ]
                found += [complete - done[-1]] if done else []
        if not found:
            raise ValueError("no save was completed")
        return found

    def _longest(self) -> float:
        """How long a save has an effect on steps, at most; a rare one that takes longer is not followed."""
        return 1.5 * statistics.median(self._offsets())

    def saves(self, attempt: Attempt) -> Iterator[tuple[bool, list[float]]]:
        """Of each save between two steps of a start: whether it was followed until its end, and seconds of the steps
        that began before.
        """
        longest, times = self._longest(), list(attempt.intervals)
        for step, _, done in times:
            if step % self.interval == 0:
                after = [each for each in times if step < each[0] <= step + self.interval]
                during = [each for each in after if each[1] < done + longest]
                followed = len(after) > len(during) or len(after) == self.interval
                if during:
                    yield followed, [each[2] - each[1] for each in during]

    def plain(self) -> list[float]:
        """Seconds of steps at which nothing else happens: no warm-up, no save, no evaluation after the last step."""
        longest, last, found, others = self._longest(), max(self.completed), list[float](), list[float]()
        for attempt in self.attempts:
            saved = -longest
            for number, (step, began, done) in enumerate(attempt.intervals):
                if number >= WARM_UP and step != last:
                    (found if began >= saved + longest else others).append(done - began)
                saved = done if step % self.interval == 0 else saved
        return found or others  # where a save follows another at once


@dataclass(frozen=True)
class Constants:
    """What a log says about a run, in seconds.

    Attributes:
        step: mean of a step at which nothing else happens.
        median: of such steps.
        start: from the start of the process to the first step, without a checkpoint.
        load: what a start from a checkpoint takes longer.
        warm_up: what the first steps take longer than others.
        save: what the steps after a save take longer than others, with the stop for the save.
        written: after that until the checkpoint is complete; 0 without background saving.
    """

    step: float
    median: float
    start: float
    load: float
    warm_up: float
    save: float
    written: float

    @classmethod
    def of(cls, logs: Sequence[Log]) -> "Constants":
        """Of logs of runs with the same settings."""
        plain = [seconds for log in logs for seconds in log.plain()]
        step, attempts = statistics.fmean(plain), [attempt for log in logs for attempt in log.attempts]
        fresh, resumed = (
            [each.ready - each.began for each in attempts if each.ready is not None and (each.first > 0) == later]
            for later in (False, True)
        )
        start = statistics.fmean(fresh or resumed)
        stops = [
            sum(seconds) - step * len(seconds)
            for log in logs
            for attempt in log.attempts
            for followed, seconds in log.saves(attempt)
            if followed
        ]
        offset = statistics.fmean(log.offset() for log in logs)
        save = statistics.fmean(stops or [offset])
        return cls(
            step=step,
            median=statistics.median(plain),
            start=start,
            load=max(0.0, statistics.fmean(resumed) - start) if resumed else 0.0,
            warm_up=statistics.fmean(extra for each in attempts if (extra := _warm_up(each, step)) is not None),
            save=save,
            written=max(0.0, offset - save) if logs[0].background else 0.0,
        )

    def job(self, steps: int, interval: int) -> Job:
        """The job of a run on one node."""
        return Job(steps, self.step, 1, max(0.0, self.save), self.written, self.load, interval)

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Losses:
    """Of a run that is done, as `Goodput` has them.

    Attributes:
        seconds: from the first start until the last checkpoint is complete.
        goodput: the time of its steps over that.
        lost: seconds by cause: `saves`, `down`, and the rest, which is `repeated` steps.
        failures: starts that did not end the run.
        before_first_step: those of them that did no step.
    """

    seconds: float
    goodput: float
    lost: dict[str, float]
    failures: int
    before_first_step: int

    @classmethod
    def of(cls, log: Log, step: float) -> "Losses":
        """Of the log of a run whose steps take so many seconds."""
        attempts, steps = log.attempts, max(log.completed)
        seconds = log.completed[steps] - attempts[0].began - log.paused
        down = sum((each.ready or each.ended) - each.began + (_warm_up(each, step) or 0.0) for each in attempts)
        down += sum(later.began - each.ended for each, later in pairwise(attempts)) - log.paused
        saves = sum(sum(times) - step * len(times) for each in attempts for _, times in log.saves(each))
        saves += log.completed[steps] - attempts[-1].steps[-1]
        lost = {"saves": saves, "down": down, "repeated": seconds - steps * step - saves - down}
        stuck = sum(each.ready is None for each in attempts)
        return cls(seconds, steps * step / seconds, lost, len(attempts) - 1, stuck)


def _warm_up(attempt: Attempt, step: float) -> float | None:
    """What the first steps took longer; None if they were not all done."""
    if attempt.ready is None or len(attempt.steps) < WARM_UP:
        return None
    return attempt.steps[WARM_UP - 1] - attempt.ready - WARM_UP * step


def _events(path: Path) -> list[Any]:
    return [Event.FromString(record) for record in RawEventFileLoader(str(path)).Load()]


def _attempt(began: float, ended: float, events: list[Any]) -> Attempt:
    """From the events of its file, the first two of which say where it begins; step 0 is an evaluation."""
    times = {event.step: event.wall_time for event in events if event.HasField("summary")}
    if not events or (events[0].step == 1 and 0 not in times):
        return Attempt(began, ended)
    ready = times.pop(0, events[0].wall_time)
    return Attempt(began, ended, ready, events[0].step - 1, tuple(times.values()))
