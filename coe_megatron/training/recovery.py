"""Recovery from NaN or exploding losses: skip the step, then roll back and skip its data, finally give up.

A step whose loss or gradient is not finite, or whose loss is too large (`recovery.loss_factor`), is skipped: it changes
no weights (`zero.train_step`), but counts as a step. After `recovery.skips` consecutive skipped steps the run loads the
most recent complete checkpoint from before the first of them and continues with the data after the last one. So no step
sees data twice, and the run does not diverge again on the same data from the same weights. Checkpoints store these
counts, so that a restart or requeue does not reset them.
"""

import math
from dataclasses import replace
from statistics import median

from coe_megatron.checkpoint.manager import CheckpointManager, TrainState
from coe_megatron.config import RunConfig
from coe_megatron.config.settings import RecoverySettings
from coe_megatron.errors import ConfigError

_ADVICE = "try a lower optimizer.lr in a new output (training.warm_start can load the weights of this run)"
_WINDOW = 50  # steps; `recovery.loss_factor` multiplies the median of their losses


class Diverged(FloatingPointError):
    """The loss stays too large or not finite, and no rollback is left; a person has to decide."""


def loss_limit(settings: RecoverySettings, position: TrainState) -> float | None:
    """The loss above which the next step is skipped; None if only losses that are not finite are skipped."""
    if settings.loss_factor is None or not position.losses:
        return None
    return settings.loss_factor * median(position.losses)


def record_step(settings: RecoverySettings, position: TrainState, loss: float, applied: bool) -> str:
    """Record the result of a step in `position`; returns a message if the step was skipped, otherwise ""."""
    if applied:
        position.losses = [*position.losses, loss][-_WINDOW:]
        position.consecutive_skips = []
        return ""
    position.skipped_steps += 1
    position.consecutive_skips = [*position.consecutive_skips, loss if math.isfinite(loss) else None]
    limit = loss_limit(settings, position)
    why = f"its loss is {loss:.4g}"
    if math.isfinite(loss):
        exploded = limit is not None and loss > limit
        why += f", above {limit:.4g} (recovery.loss_factor)" if exploded else " and a gradient is not finite"
    count = f"{len(position.consecutive_skips)} of {settings.skips} consecutive skips (recovery.skips)"
    return f"step {position.step} is skipped, it changes no weights: {why}; {count}"


def rollback_due(settings: RecoverySettings, position: TrainState) -> bool:
    """Whether the limit of consecutive skipped steps is reached, so that the run must roll back."""
    return len(position.consecutive_skips) >= settings.skips


def roll_back(config: RunConfig, position: TrainState, checkpoints: CheckpointManager) -> tuple[TrainState, str]:
    """Load the most recent complete checkpoint from before the skipped steps; all ranks call this together.

    Returns:
        The new train state, and a message for the user.

    Raises:
        Diverged: no rollback is left, or there is no checkpoint; one line that says what to try.
    """
    limit, now = config.recovery.rollbacks, position.step
    before = now - len(position.consecutive_skips)
    happened = (
        f"steps {before + 1} to {now} were skipped, their losses were {_format_losses(position.consecutive_skips)}"
    )
    if len(position.rollbacks) >= limit:
        raise Diverged(
            f"{happened}; the run has used all its rollbacks (recovery.rollbacks is {limit}): {_ADVICE}, or a larger "
            "recovery.rollbacks, which skips more data"
        )
    try:
        found = checkpoints.resume_before(before, now)
    except ConfigError as error:
        raise Diverged(f"{happened}, and the run cannot roll back: {error}") from error
    if found is None:
        raise Diverged(f"{happened}, and there is no older checkpoint: {_ADVICE}, or a smaller training.save_every")
    first, end = (each.step + each.data_offset for each in (found, position))
    samples = [first * config.training.global_batch, end * config.training.global_batch - 1]
    event = {"from_step": now, "to_step": found.step, "samples": samples, "losses": position.consecutive_skips}
    done = [*position.rollbacks, event]
    message = (
        f"rolled back from step {now} to step {found.step}, skipping samples {samples[0]:,} to {samples[1]:,} of the "
        f"run's order; {len(done)} of {limit} rollbacks (recovery.rollbacks)"
    )
    return replace(found, data_offset=end - found.step, rollbacks=done, consecutive_skips=[]), message


def _format_losses(losses: list[float | None]) -> str:
    return ", ".join("not finite" if loss is None else f"{loss:.4g}" for loss in losses)
