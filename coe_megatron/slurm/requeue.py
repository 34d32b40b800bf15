"""Whether a job that a scheduler runs goes on after an attempt has ended: what is kept of it, and the decision.

A run under a scheduler is started again and again: after time limits, preemptions, nodes that went down. That has to
end by itself where it leads nowhere, so every attempt notes the newest checkpoint that it found. Without torch.
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

NO_CHECKPOINT = 0  # the step of a run that has not saved yet
_WHY_NOT = {
    ExitStatus.DONE: "the run is done",
    ExitStatus.MISTAKE: "a mistake in config or data would come again",
    ExitStatus.DIVERGED: "the loss has diverged: a person decides",
    ExitStatus.NOT_SAVED: "a checkpoint could not be written: a person makes room",
    ExitStatus.OUTPUT_LOST: "the output folder was removed or moved: a person moves it back",
    ExitStatus.INTERRUPTED: "it was interrupted from the keyboard",
}


class Refused(Exception):
    """An attempt does not begin; its text is one line.

    Attributes:
        status: with which the job is to end.
    """

    def __init__(self, text: str, status: ExitStatus) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Attempt:
    """One start of a run by a scheduler.

    Attributes:
        job: the scheduler's name of the job.
        began, ended: ISO 8601; `ended` is missing of one that went down with its node.
        output: the run's own folder, whose checkpoints are the measure of progress.
        step: of the newest checkpoint there when it began.
        status, reason: how it ended, and the decision on it in words.
        again: whether that was to go on.
    """

    job: str
    began: str
    output: str
    step: int
    ended: str | None = None
    status: int | None = None
    again: bool | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Decision:
    """Whether to go on after an attempt, and why (not), in one line."""

    again: bool
    reason: str


class Attempts:
    """The attempts of one run, in a JSON file of a folder that all of them share.

    Args:
        folder: made when the first attempt begins.
        limit: how many attempts may follow one another without a newer checkpoint, the first of them not counted.

    A file that is damaged is set aside, which is said, and made anew: the count begins again.

    Raises:
        ConfigError: the file is none, or cannot be read or written.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._path, self._limit = folder / "attempts.json", limit
        self._all = _read(self._path)

    def begin(self, job: str, output: Path) -> Path:
        """Note an attempt of a run in the folder `output`; returns a new folder for what the attempt leaves behind.

        Raises:
            Refused: the attempts before led nowhere, or another job of the same chain has ended for good.
        """
        if self._all and self._all[-1].again is False and self._all[-1].job != job:
            raise Refused(
                f"job {self._all[-1].job} of this chain has ended for good: {self._all[-1].reason}",
                known_status(self._all[-1].status or 0),
            )
        step = newest_step(output)
        if (before := self._stalled(step)) > self._limit:
            raise Refused(self._no_progress(before, step), ExitStatus.FAILED)
        folder = self._path.parent / f"attempt-{self._number()}"
        folder.mkdir(parents=True)
        self._all.append(Attempt(job, _now(), str(output.absolute()), step))
        self._write()
        return folder

    def end(self, status: ExitStatus) -> Decision:
        """Note how the attempt ended that `begin` noted last, and decide.

        Raises:
            ConfigError: none has begun.
        """
        if not self._all:
            if not any(self._path.parent.glob("attempt-*")):
                raise ConfigError(f"--logs is {self._path.parent}: no attempt has begun there")
            return Decision(status.again, "how it began is not known: the attempts' file was damaged")
        self._all[-1] = last = replace(self._all[-1], ended=_now(), status=int(status))
        step = newest_step(Path(last.output))
        if not status.again:
            decision = Decision(False, _WHY_NOT[status])
        elif (stalled := self._stalled(step)) > self._limit:
            decision = Decision(False, self._no_progress(stalled, step))
        else:
            made = f"{stalled} in a row without a newer checkpoint" if stalled else "with a newer checkpoint"
            decision = Decision(True, f"attempt {len(self._all)}, {made}; the newest is of step {step}")
        self._all[-1] = replace(last, again=decision.again, reason=decision.reason)
        self._write()
        return decision

    def _number(self) -> int:
        """Of the next attempt: no folder has it, though the file may have been made anew."""
        there = (path.name.removeprefix("attempt-") for path in self._path.parent.glob("attempt-*"))
        return max([len(self._all), *(int(number) + 1 for number in there if number.isdecimal())])

    def _stalled(self, step: int) -> int:
        """How many of the last attempts began from the very checkpoint that is the newest now, or were kept out.

        Checkpoints that another run has written into the folder meanwhile are no progress of an attempt.
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
        why = f"another run writes {output}" if busy else f"the newest checkpoint in {output} {found}"
        return f"{attempts} attempts in a row without progress, COE_MAX_REQUEUES allows {self._limit} requeues: {why}"

    def _write(self) -> None:
        write_atomically(self._path, json.dumps([asdict(attempt) for attempt in self._all], indent=1) + "\n")


def newest_step(output: Path) -> int:
    """The step of the newest checkpoint whose saving was finished; NO_CHECKPOINT where there is none."""
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
