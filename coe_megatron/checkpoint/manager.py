"""Where a run stands, saved and taken up again: from its own checkpoints, or with the weights of another run."""

import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from coe_megatron.checkpoint import listing
from coe_megatron.checkpoint import save_load as store
from coe_megatron.checkpoint.background import Background
from coe_megatron.config import RunConfig
from coe_megatron.data.run_data import RunData
from coe_megatron.distributed.collectives import broadcast, is_rank0, run_on_rank0
from coe_megatron.errors import ConfigError
from coe_megatron.run import disk_space as room
from coe_megatron.run import folder as run_folder
from coe_megatron.zero.engine import Engine

_PATIENCE = 10  # times as long as a save took that failed is trained before the next try
_ANOTHER = {"tokenizer": "another tokenizer", "text": "another text (or order or weights)"}


@dataclass
class TrainState:
    """Where a run stands: what a checkpoint has to hold beside weights, optimizer states and random states.

    Attributes:
        step: steps done, with those that were left out.
        tokens: counted in these steps.
        skipped_steps: how many of these steps changed nothing.
        consecutive_skips: the losses of the most recent steps if they were skipped; None where not finite.
        losses: of the newest steps that were taken.
        data_offset: by how many steps the data are ahead, for rolling back went past them.
        rollbacks: what the policy (`recovery`) did so far, an object each time.
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
        """What a checkpoint holds of it (`checkpoint.facts` has looked at the types).

        Raises:
            ConfigError: something is missing.
        """
        if missing := [each.name for each in fields(cls) if each.name not in state]:
            raise ConfigError(f"state.json of a checkpoint does not say where the run stood: {missing[0]} is missing")
        return cls(**{each.name: state[each.name] for each in fields(cls)})


class CheckpointManager:
    """The checkpoints of one run. Each remembers the tokenizer and the training text, wherever these lie.

    As a context it ends, by an error too, when no checkpoint is being written any more; an interruption is not kept
    waiting.

    Args:
        folder: of the run.
        engine: whose weights and states are saved and taken up.
        size: bytes that one takes.
    """

    def __init__(self, folder: Path, config: RunConfig, data: RunData, engine: Engine, size: int) -> None:
        self._run, self._folder, self._config, self._engine = folder, folder / "checkpoints", config, engine
        self._background = Background() if config.training.background_saving else None
        self._size, self._warned = size, False
        self._owed = False  # a checkpoint that could not be written
        self._mended = ""  # to be said when the one that is being written has come in its place
        self._began = self._not_before = 0.0  # the last try, and the next one
        self._damaged: set[int] = set()  # steps of checkpoints that were passed over
        self._tokenizer_size = data.tokenizer_size
        self._identity: dict[str, Any] = {"tokenizer": data.tokenizer_sha256, "text": data.text_identity}

    def resume(self) -> tuple[TrainState, str]:
        """Go on from the newest whole checkpoint; where there is none begin, with another run's weights if asked.

        Returns:
            Where the run stands, and a line for the user, empty when it begins with random weights.

        Raises:
            ConfigError: a checkpoint is of another config, model, tokenizer or text, or beyond `training.steps`.
        """
        remark = run_on_rank0(self._same_run)
        state = store.load_latest(self._folder, self._engine)
        if state is not None:
            position = TrainState.of(state)
            self._require_same(state, ("tokenizer", "text"), f"the checkpoints in {self._run}")
            self._require_steps(position.step)
            self._damaged = listing.steps_beyond(self._folder, position.step)
            return position, self._resumed(position.step, remark)
        if self._config.training.warm_start is not None:
            return TrainState(), self._warm_start(Path(self._config.training.warm_start))
        return TrainState(), ""

    def resume_before(self, step: int, now: int) -> TrainState | None:
        """Go back to the newest whole checkpoint of `step` or an earlier one; those from there to `now` are deleted.

        Raises:
            ConfigError: there are checkpoints as old, and none of them is whole.
        """
        self._owed, self._mended = False, ""
        if self._background is not None:
            with suppress(store.CheckpointNotSaved):  # it was said, and no other step will have to be repeated for it
                self._background.wait()
        checkpoint = listing.newest_whole(self._folder, up_to=step)
        if checkpoint is None:
            return None
        run_on_rank0(lambda: listing.delete_between(self._folder, step + 1, now))
        position = TrainState.of(store.load(checkpoint, self._engine))
        self._damaged = listing.steps_beyond(self._folder, position.step)
        return position

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        if self._background is None or (kind is not None and not issubclass(kind, Exception)):
            return
        try:
            self._background.wait()
        except store.CheckpointNotSaved:
            if kind is None:  # otherwise the error that is under way is the one to tell
                raise

    def after_step(self, position: TrainState, due: bool, logged: bool, last: bool) -> str:
        """Save the run as it stands where that is due, or still owed; all ranks together.

        A save that fails is not the end: it is owed, and tried again after every logged step until one is written.
        Before a try rank 0 looks whether there is room, since a try costs time and a whole checkpoint's space.

        Args:
            due: a checkpoint belongs to this step.
            logged: this step is logged.
            last: no step follows, so return when the checkpoint is written, also with `training.background_saving`.

        Returns:
            On rank 0 a line for the user, or several, or nothing.

        Raises:
            CheckpointNotSaved: the last one could not be written.
        """
        said = [self._look_behind(wait=due or last)] if due or logged else []
        if due or (logged and self._owed):
            said.append(self._try(position, due, last))
        if logged and not self._owed:
            said.append(self._look_ahead())
        return "\n".join(filter(None, said))

    def _same_run(self) -> str:
        if not self._folder.exists():
            return ""
        return run_folder.check_same_run(self._run, self._config, self._tokenizer_size)

    def _look_behind(self, wait: bool) -> str:
        """What became of the checkpoint that is being written in the background."""
        if self._background is None or not (wait or broadcast(self._background.is_done())):
            return ""
        try:
            self._background.wait()
        except store.CheckpointNotSaved as error:
            return self._failed(error)
        said, self._mended = self._mended, ""
        return said

    def _try(self, position: TrainState, due: bool, last: bool) -> str:
        if not last and (reason := broadcast(self._why_not() if is_rank0() else "")):
            self._owed = True
            return self._trouble(f"the checkpoint of step {position.step} is not saved: {reason}") if due else ""
        self._began = time.monotonic()
        try:
            self._save(position, last)
        except store.CheckpointNotSaved as error:
            if last:
                raise
            return self._failed(error)
        said = f"the checkpoint of step {position.step} is saved, in place of those that could not be" * self._owed
        self._owed = False
        if self._background is not None and not last:
            self._mended, said = said, ""
        return said

    def _failed(self, error: store.CheckpointNotSaved) -> str:
        now = time.monotonic()
        self._owed, self._mended, self._not_before = True, "", now + _PATIENCE * (now - self._began)
        return self._trouble(error)

    def _save(self, position: TrainState, last: bool) -> None:
        training, state = self._config.training, {**asdict(position), **self._identity}
        self._damaged.discard(position.step)  # it makes room for this one
        spared = {*training.milestones, *self._damaged}
        keep = training.keep_checkpoints
        store.save(self._folder, position.step, self._engine, state, keep, spared, self._background)
        if last and self._background is not None:
            self._background.wait()

    def _why_not(self) -> str:
        """On rank 0: why to save now would be in vain, as far as can be seen."""
        if time.monotonic() < self._not_before:
            return "the last try failed a moment ago"
        return room.trouble(self._run, self._size)

    def _look_ahead(self) -> str:
        """On rank 0: a warning, once, when there will not be room for the next checkpoint."""
        if not is_rank0() or (self._background is not None and not self._background.is_done()):
            return ""
        trouble = room.trouble(self._run, self._size)
        said = f"the next checkpoint will not be saved unless this is mended: {trouble}"
        said, self._warned = "" if self._warned else said, bool(trouble)
        return said if trouble else ""

    def _trouble(self, what: object) -> str:
        if not is_rank0():
            return ""
        listed: list[Path] = []
        with suppress(ConfigError):  # the folder cannot be read
            listed = listing.newest_first(self._folder)
        newest = next((entry.name for entry in listed if listing.finished(entry)), "none")
        return f"{what}; training goes on and saves as soon as it can, the newest checkpoint is {newest}"

    def _resumed(self, step: int, remark: str) -> str:
        steps = self._config.training.steps
        if step >= steps:
            return f"finished already, at step {step}; a larger training.steps goes on{remark}"
        return f"resumed at step {step}{remark}"

    def _warm_start(self, source: Path) -> str:
        try:
            checkpoint, state = store.load_weights(source, self._engine)
        except ConfigError as error:
            raise ConfigError(f"training.warm_start is {source}: {error}") from error
        self._require_same(state, ("tokenizer",), f"training.warm_start {source}")
        return f"begins with the weights of {checkpoint}, after {state.get('tokens', 0):,} tokens"

    def _require_same(self, state: dict[str, Any], kinds: tuple[str, ...], whose: str) -> None:
        setting = "data.path" if self._config.data.blend is None else "data.blend"
        for kind in kinds:
            if state.get(kind) != self._identity[kind]:
                raise ConfigError(f"{setting} has {_ANOTHER[kind]} than {whose}: give the data these were trained on")

    def _require_steps(self, done: int) -> None:
        if (steps := self._config.training.steps) < done:
            raise ConfigError(
                f"training.steps is {steps}: the run in {self._run} has done {done}; give as many or another output"
            )
