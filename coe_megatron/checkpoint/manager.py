"""Saves and resumes a run: from its own checkpoints, or with the weights of another run."""

import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from coe_megatron.checkpoint import listing, save_load
from coe_megatron.checkpoint.background import Background
from coe_megatron.config import RunConfig
from coe_megatron.data.run_data import RunData
from coe_megatron.distributed.collectives import broadcast, is_rank0, run_on_rank0
from coe_megatron.errors import ConfigError
from coe_megatron.run import disk_space
from coe_megatron.run import folder as run_folder
from coe_megatron.zero.engine import Engine

_RETRY_FACTOR = 10  # after a failed save, train this many times its duration before the next try
_DIFFERENCES = {"tokenizer": "another tokenizer", "text": "another text (or order or weights)"}


@dataclass
class TrainState:
    """State of the training loop: what a checkpoint holds besides weights, optimizer states and RNG states.

    Attributes:
        step: steps done, including skipped ones.
        tokens: counted tokens in these steps.
        skipped_steps: number of these steps that were skipped.
        consecutive_skips: the losses of the most recent steps if these were skipped; None where not finite.
        losses: of the most recent applied steps.
        data_offset: steps of data that rollbacks have skipped.
        rollbacks: one object for each rollback so far (`recovery`).
    """

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    consecutive_skips: list[float | None] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    data_offset: int = 0
    rollbacks: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, state: dict[str, Any]) -> "TrainState":
        """Read the state from a checkpoint's `state.json`, whose types `checkpoint.metadata` has checked.

        Raises:
            ConfigError: a field is missing.
        """
        if missing := [each.name for each in fields(cls) if each.name not in state]:
            raise ConfigError(f"state.json of a checkpoint is incomplete: {missing[0]} is missing")
        return cls(**{each.name: state[each.name] for each in fields(cls)})


class CheckpointManager:
    """The checkpoints of one run. Each records checksums of the tokenizer and the training text.

    As a context manager it waits for a background save when it ends, also after an error, but not after an
    interruption.

    Args:
        folder: of the run.
        engine: its weights and states are saved and loaded.
        size: bytes of a checkpoint.
    """

    def __init__(self, folder: Path, config: RunConfig, data: RunData, engine: Engine, size: int) -> None:
        self._run, self._folder, self._config, self._engine = folder, folder / "checkpoints", config, engine
        self._background = Background() if config.training.background_saving else None
        self._size, self._warned = size, False
        self._pending = False  # whether a checkpoint could not be written and is still to be saved
        self._pending_message = ""  # message for when the background save that makes up for it is done
        self._save_began = self._retry_after = 0.0  # start of the last save, earliest time of the next
        self._damaged: set[int] = set()  # steps of checkpoints that were skipped
        self._tokenizer_size = data.tokenizer_size
        self._identity: dict[str, Any] = {"tokenizer": data.tokenizer_sha256, "text": data.text_identity}

    def resume(self) -> tuple[TrainState, str]:
        """Resume from the most recent complete checkpoint; or start, from another run's weights or checkpoint if
        configured.

        Returns:
            The state, and a line for the user, which is empty if the run starts from random weights.

        Raises:
            ConfigError: a checkpoint is of another config, model, tokenizer or text, or beyond `training.steps`.
        """
        remark = run_on_rank0(self._same_run)
        state = save_load.load_latest(self._folder, self._engine)
        if state is not None:
            train_state = TrainState.of(state)
            self._require_same(state, ("tokenizer", "text"), f"the checkpoints in {self._run}")
            self._require_steps(train_state.step)
            self._damaged = listing.steps_after(self._folder, train_state.step)
            return train_state, self._resumed(train_state.step, remark)
        if self._config.training.warm_start is not None:
            return TrainState(), self._warm_start(Path(self._config.training.warm_start))
        if self._config.training.branch_from is not None:
            return self._branch(Path(self._config.training.branch_from))
        return TrainState(), ""

    def resume_before(self, step: int, now: int) -> TrainState | None:
        """Roll back to the most recent complete checkpoint up to `step`; deletes those after `step` up to `now`.

        Returns:
            The state; None if there is no checkpoint up to `step`.

        Raises:
            ConfigError: there are checkpoints up to `step`, but none is complete.
        """
        self._pending, self._pending_message = False, ""
        if self._background is not None:
            with suppress(save_load.CheckpointNotSaved):  # reported before, and the rollback repeats this step anyway
                self._background.wait()
        checkpoint = listing.latest_complete(self._folder, up_to=step)
        if checkpoint is None:
            return None
        run_on_rank0(lambda: listing.delete_between(self._folder, step + 1, now))
        train_state = TrainState.of(save_load.load(checkpoint, self._engine))
        self._damaged = listing.steps_after(self._folder, train_state.step)
        return train_state

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        if self._background is None or (kind is not None and not issubclass(kind, Exception)):
            return
        try:
            self._background.wait()
        except save_load.CheckpointNotSaved:
            if kind is None:  # otherwise the error in flight is the one to report
                raise

    def after_step(self, train_state: TrainState, due: bool, logged: bool, last: bool) -> str:
        """Save the run if a checkpoint is due or an earlier save has failed; collective.

        Training continues after a failed save, which is retried after every logged step until one succeeds. Before each
        try rank 0 checks the disk space, since a try costs time and the space of a checkpoint.

        Args:
            due: a checkpoint is due after this step.
            logged: this step is logged.
            last: this is the last step: return only when the checkpoint is written, even with
                `training.background_saving`.

        Returns:
            On rank 0 lines for the user, possibly none.

        Raises:
            CheckpointNotSaved: the last checkpoint could not be written.
        """
        messages = [self._poll_background(wait=due or last)] if due or logged else []
        if due or (logged and self._pending):
            messages.append(self._try_save(train_state, due, last))
        if logged and not self._pending:
            messages.append(self._warn_of_disk_space())
        return "\n".join(filter(None, messages))

    def _same_run(self) -> str:
        if not self._folder.exists():
            return ""
        return run_folder.check_same_run(self._run, self._config, self._tokenizer_size)

    def _poll_background(self, wait: bool) -> str:
        """Messages about the background save, if it is done."""
        if self._background is None or not (wait or broadcast(self._background.is_done())):
            return ""
        try:
            self._background.wait()
        except save_load.CheckpointNotSaved as error:
            return self._failed(error)
        message, self._pending_message = self._pending_message, ""
        return message

    def _try_save(self, train_state: TrainState, due: bool, last: bool) -> str:
        if not last and (reason := broadcast(self._save_problem() if is_rank0() else "")):
            self._pending = True
            return self._postponed(f"the checkpoint of step {train_state.step} is not saved: {reason}") if due else ""
        self._save_began = time.monotonic()
        try:
            self._save(train_state, last)
        except save_load.CheckpointNotSaved as error:
            if last:
                raise
            return self._failed(error)
        message = f"the checkpoint of step {train_state.step} is saved; earlier ones could not be" * self._pending
        self._pending = False
        if self._background is not None and not last:
            self._pending_message, message = message, ""
        return message

    def _failed(self, error: save_load.CheckpointNotSaved) -> str:
        now = time.monotonic()
        self._pending, self._pending_message = True, ""
        self._retry_after = now + _RETRY_FACTOR * (now - self._save_began)
        return self._postponed(error)

    def _save(self, train_state: TrainState, last: bool) -> None:
        training, state = self._config.training, {**asdict(train_state), **self._identity}
        self._damaged.discard(train_state.step)  # this save replaces it
        kept = {*training.milestones, *self._damaged}
        keep = training.keep_checkpoints
        save_load.save(self._folder, train_state.step, self._engine, state, keep, kept, self._background)
        if last and self._background is not None:
            self._background.wait()

    def _save_problem(self) -> str:
        """On rank 0: why a save would fail now, as far as this can be checked; empty if it would not."""
        if time.monotonic() < self._retry_after:
            return "the last try has just failed"
        return disk_space.problem(self._run, self._size)

    def _warn_of_disk_space(self) -> str:
        """On rank 0: a warning, given once, if the next checkpoint cannot be saved."""
        if not is_rank0() or (self._background is not None and not self._background.is_done()):
            return ""
        problem = disk_space.problem(self._run, self._size)
        message = f"the next checkpoint cannot be saved unless this is fixed: {problem}"
        message, self._warned = "" if self._warned else message, bool(problem)
        return message if problem else ""

    def _postponed(self, reason: object) -> str:
        if not is_rank0():
            return ""
        listed: list[Path] = []
        with suppress(ConfigError):  # the folder cannot be read
            listed = listing.newest_first(self._folder)
        latest = next((entry.name for entry in listed if listing.finished(entry)), "none")
        return f"{reason}; training continues and retries, the most recent checkpoint is {latest}"

    def _resumed(self, step: int, remark: str) -> str:
        steps = self._config.training.steps
        if step >= steps:
            return f"already finished at step {step}; increase training.steps to continue{remark}"
        return f"resumed at step {step}{remark}"

    def _warm_start(self, source: Path) -> str:
        try:
            checkpoint, state = save_load.load_weights(source, self._engine)
        except ConfigError as error:
            raise ConfigError(f"training.warm_start is {source}: {error}") from error
        if "tokenizer" in state:  # an imported model may have none
            self._require_same(state, ("tokenizer",), f"training.warm_start {source}")
        return f"starts from the weights of {checkpoint}, after {state.get('tokens', 0):,} tokens"

    def _branch(self, source: Path) -> tuple[TrainState, str]:
        """Continue another run with the same settings from one of its checkpoints."""
        checkpoint = listing.find(source)
        try:
            trunk = checkpoint.parents[1]
            remark = run_on_rank0(lambda: run_folder.check_same_run(trunk, self._config, self._tokenizer_size))
            state = save_load.load(checkpoint, self._engine)
        except ConfigError as error:
            raise ConfigError(f"training.branch_from is {source}: {error}") from error
        train_state = TrainState.of(state)
        self._require_same(state, ("tokenizer", "text"), f"training.branch_from {source}")
        self._require_steps(train_state.step)
        return train_state, f"continues {checkpoint} at step {train_state.step}{remark}"

    def _require_same(self, state: dict[str, Any], kinds: tuple[str, ...], source: str) -> None:
        setting = "data.path" if self._config.data.blend is None else "data.blend"
        for kind in kinds:
            if state.get(kind) != self._identity[kind]:
                raise ConfigError(
                    f"{setting} has {_DIFFERENCES[kind]} than {source}: use the data that it was trained on"
                )

    def _require_steps(self, done: int) -> None:
        if (steps := self._config.training.steps) < done:
            raise ConfigError(
                f"training.steps is {steps}: the run in {self._run} has done {done}; set at least that many, or use "
                "another output"
            )
