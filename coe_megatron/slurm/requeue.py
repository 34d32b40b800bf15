"""Records the attempts of a run under a scheduler, and decides whether to requeue it. Without torch.

A scheduler restarts a run after time limits, preemptions and node failures. These restarts must stop when they make no
progress, so each attempt records the most recent checkpoint that it found.
"""

import json
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from coe_megatron.checkpoint.names import finished_steps
from coe_megatron.errors import ConfigError
from coe_megatron.files import read_limited, require_replaceable, set_aside, write_atomically
from coe_megatron.parsing import JSON_BYTES, first_of
from coe_megatron.run.exit_status import ExitStatus, known_status

NO_CHECKPOINT = 0  # the step of a run that has saved no checkpoint yet
_WHY_NOT = {
    ExitStatus.DONE: "the run is done",
    ExitStatus.MISTAKE: "the same error in config or data would occur again",
    ExitStatus.DIVERGED: "the loss has diverged, which needs a decision by the user",
    ExitStatus.NOT_SAVED: "a checkpoint could not be written; free some space first",
    ExitStatus.OUTPUT_LOST: "the output folder was removed or moved; move it back first",
    ExitStatus.INTERRUPTED: "it was interrupted from the keyboard",
}


class AttemptRefused(Exception):
    """An attempt must not start; its text is one line.

    Attributes:
        status: exit status for the job.
    """

    def __init__(self, text: str, status: ExitStatus) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Attempt:
    """One start of a run by a scheduler.

    Attributes:
        job: the scheduler's id of the job.
        began, ended: ISO 8601; `ended` is None if the attempt died with its node.
        output: the folder of the run, whose checkpoints measure progress.
        step: step of the most recent checkpoint at its start.
        status: its exit status.
        requeue, reason: whether to requeue the run after it, and why.
    """

    job: str
    began: str
    output: str
    step: int
    ended: str | None = None
    status: int | None = None
    requeue: bool | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Decision:
    """Whether to requeue the run after an attempt, and a one-line reason."""

    requeue: bool
    reason: str


class Attempts:
    """The attempts of one run, recorded in a JSON file in the folder that they share.

    A damaged file is renamed and reported, and the count restarts from zero.

    Args:
        folder: created when the first attempt begins.
        limit: the largest number of consecutive requeues without a newer checkpoint.

    Raises:
        ConfigError: something else is in the place of the file, or it cannot be read or written.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._path, self._limit = folder / "attempts.json", limit
        self._all = _read(self._path)

    def begin(self, job: str, output: Path) -> Path:
        """Record the start of an attempt of the run in `output`; returns a new folder for the attempt's logs.

        Raises:
            AttemptRefused: earlier attempts made no progress, or another job of the same chain has ended for good.
        """
        if self._all and self._all[-1].requeue is False and self._all[-1].job != job:
            raise AttemptRefused(
                f"job {self._all[-1].job} of this chain has ended for good: {self._all[-1].reason}",
                known_status(self._all[-1].status or 0),
            )
        step = latest_step(output)
        if (before := self._stalled(step)) > self._limit:
            raise AttemptRefused(self._no_progress(before, step), ExitStatus.FAILED)
        folder = self._path.parent / f"attempt-{self._number()}"
        folder.mkdir(parents=True)
        self._all.append(Attempt(job, _now(), str(output.absolute()), step))
        self._write()
        return folder

    def end(self, status: ExitStatus) -> Decision:
        """Record how the last attempt ended, and decide whether to requeue.

        Raises:
            ConfigError: no attempt has started.
        """
        if not self._all:
            if not any(self._path.parent.glob("attempt-*")):
                raise ConfigError(f"--logs is {self._path.parent}: no attempt has started there")
            return Decision(status.retryable, "its start is unknown, because attempts.json was damaged")
        self._all[-1] = last = replace(self._all[-1], ended=_now(), status=int(status))
        step = latest_step(Path(last.output))
        if not status.retryable:
            decision = Decision(False, _WHY_NOT[status])
        elif (stalled := self._stalled(step)) > self._limit:
            decision = Decision(False, self._no_progress(stalled, step))
        else:
            progress = f"{stalled} in a row without a newer checkpoint" if stalled else "with a newer checkpoint"
            decision = Decision(True, f"attempt {len(self._all)}, {progress}; the most recent is of step {step}")
        self._all[-1] = replace(last, requeue=decision.requeue, reason=decision.reason)
        self._write()
        return decision

    def _number(self) -> int:
        """The number of the next attempt; no folder has it, even if the file was replaced."""
        there = (path.name.removeprefix("attempt-") for path in self._path.parent.glob("attempt-*"))
        return max([len(self._all), *(int(number) + 1 for number in there if number.isdecimal())])

    def _stalled(self, step: int) -> int:
        """How many of the last attempts started from the present most recent checkpoint, or found the folder locked.

        Checkpoints that another run wrote there do not count as progress.
        """
        count = 0
        for attempt in reversed(self._all):
            if attempt.step != step and attempt.status != ExitStatus.BUSY:
                break
            count += 1
        return count

    def _no_progress(self, attempts: int, step: int) -> str:
        output, found = self._all[-1].output, f"is still that of step {step}" if step else "does not exist yet"
        busy = self._all[-1].status == ExitStatus.BUSY
        why = f"another run has locked {output}" if busy else f"the most recent checkpoint in {output} {found}"
        return f"{attempts} attempts in a row without progress, COE_MAX_REQUEUES allows {self._limit} requeues: {why}"

    def _write(self) -> None:
        write_atomically(self._path, json.dumps([asdict(attempt) for attempt in self._all], indent=1) + "\n")


def latest_step(output: Path) -> int:
    """The step of the most recent finished checkpoint; NO_CHECKPOINT if there is none."""
    return max(finished_steps(output / "checkpoints"), default=NO_CHECKPOINT)


def _read(path: Path) -> list[Attempt]:
    require_replaceable(path, "attempts.json")
    if not path.exists():
        return []
    content = read_limited(path, "attempts.json", JSON_BYTES)
    try:
        return TypeAdapter(list[Attempt]).validate_json(content, strict=True)
    except ValidationError as error:
        set_aside(path, f"is damaged ({first_of(error)})")
        return []


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
