"""What a run does about steps that would spoil it: leaves them out, then rolls back past their data, at last gives up.

A step whose loss or gradient is not finite, or whose loss is too large (`recovery.loss_factor`), changes nothing
(`zero.passes.train_step`), and counts as a step. After `recovery.skips` of them in a row the run takes up the newest
whole checkpoint from before the first of them, and goes on with the data that follow the last: so no step meets data
twice, and the same weights do not come by the same way to the same place. The checkpoints hold what was done, so that
neither a restart nor a requeue begins to count anew.
"""

import math
from dataclasses import replace
from statistics import median

from coe_megatron.checkpoint.manager import CheckpointManager, TrainState
from coe_megatron.config import RunConfig
from coe_megatron.config.settings import RecoverySettings
from coe_megatron.errors import ConfigError

_ADVICE = "a lower optimizer.lr may help, in another output (training.warm_start begins with the weights of this one)"
_RECENT = 50  # steps whose median loss is what `recovery.loss_factor` multiplies


class Diverged(FloatingPointError):
    """The loss stays too large or not finite, and the policy allows nothing more: a person has to decide."""


def largest_loss(settings: RecoverySettings, position: TrainState) -> float | None:
    """Above which loss the coming step is left out; None where only what is not finite is."""
    if settings.loss_factor is None or not position.losses:
        return None
    return settings.loss_factor * median(position.losses)


def note_step(settings: RecoverySettings, position: TrainState, loss: float, taken: bool) -> str:
    """Note in `position` how the step just done went; returns a line for the user if it was left out, else nothing."""
    if taken:
        position.losses = [*position.losses, loss][-_RECENT:]
        position.consecutive_skips = []
        return ""
    position.skipped_steps += 1
    position.consecutive_skips = [*position.consecutive_skips, loss if math.isfinite(loss) else None]
    largest = largest_loss(settings, position)
    why = f"its loss is {loss:.4g}"
    if math.isfinite(loss):
        exploded = largest is not None and loss > largest
        why += f", above {largest:.4g} (recovery.loss_factor)" if exploded else " and a gradient is not finite"
    row = f"{len(position.consecutive_skips)} in a row, of {settings.skips} (recovery.skips)"
    return f"step {position.step} is left out, it changes nothing: {why}; {row}"


def is_due(settings: RecoverySettings, position: TrainState) -> bool:
    """Whether so many steps in a row were left out that the run has to roll back."""
    return len(position.consecutive_skips) >= settings.skips


def roll_back(config: RunConfig, position: TrainState, checkpoints: CheckpointManager) -> tuple[TrainState, str]:
    """Take up the newest whole checkpoint from before the steps that were left out; all ranks together.

    Returns:
        Where the run stands now, and a line for the user.

    Raises:
        Diverged: no roll-back is left, or there is no checkpoint; one line that says what to try.
    """
    limit, now = config.recovery.rollbacks, position.step
    before = now - len(position.consecutive_skips)
    happened = f"steps {before + 1} to {now} were left out, their losses were {_shown(position.consecutive_skips)}"
    if len(position.rollbacks) >= limit:
        raise Diverged(
            f"{happened}; recovery.rollbacks is {limit}, and the run has rolled back as often: {_ADVICE}, or a larger "
            "recovery.rollbacks, which goes past more data"
        )
    try:
        found = checkpoints.resume_before(before, now)
    except ConfigError as error:
        raise Diverged(f"{happened}, and the run cannot roll back: {error}") from error
    if found is None:
        raise Diverged(f"{happened}, and no checkpoint is older: {_ADVICE}, or a smaller training.save_every")
    first, end = (each.step + each.data_offset for each in (found, position))
    samples = [first * config.training.global_batch, end * config.training.global_batch - 1]
    event = {"from_step": now, "to_step": found.step, "samples": samples, "losses": position.consecutive_skips}
    done = [*position.rollbacks, event]
    said = (
        f"rolled back from step {now} to step {found.step}, and past the samples {samples[0]:,} to {samples[1]:,} of "
        f"the run's order; {len(done)} of {limit} times (recovery.rollbacks)"
    )
    return replace(found, data_offset=end - found.step, rollbacks=done, consecutive_skips=[]), said


def _shown(losses: list[float | None]) -> str:
    return ", ".join("not finite" if loss is None else f"{loss:.4g}" for loss in losses)
