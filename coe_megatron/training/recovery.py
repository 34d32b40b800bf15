"""What a run does about steps that would spoil it: it leaves them out, then rolls back past their data, and at last ends.

A step whose loss or gradient is not finite, or whose loss is too large (`recovery.loss_factor`), changes nothing
(`zero.passes.train_step`), and counts as a step. After `recovery.skips` of them in a row the run takes up the newest
whole checkpoint from before the first of them, and goes on with the data that follow the last: so no step meets data
twice, and the same weights do not come by the same way to the same place. The checkpoints hold what was done, so that
neither a restart nor a requeue begins to count anew.
"""

import math
from dataclasses import replace
from statistics import median

from coe_megatron.config.settings import RecoverySettings
from coe_megatron.training.continuation import Checkpoints, Position

_RECENT = 50  # steps whose median loss is what `recovery.loss_factor` multiplies


class Diverged(FloatingPointError):
    """The loss stays too large or not finite, and the policy allows nothing more: a person has to decide."""


def largest_loss(settings: RecoverySettings, position: Position) -> float | None:
    """Above which loss the coming step is left out; None where only what is not finite is."""
    if settings.loss_factor is None or not position.losses:
        return None
    return settings.loss_factor * median(position.losses)


def note_step(settings: RecoverySettings, position: Position, loss: float, taken: bool) -> str:
    """Note in `position` how the step just done went; returns a line for the user if it was left out, else nothing."""
    if taken:
        position.losses = [*position.losses, loss][-_RECENT:]
        position.in_a_row = []
        return ""
    position.left_out += 1
    position.in_a_row = [*position.in_a_row, loss if math.isfinite(loss) else None]
    largest = largest_loss(settings, position)
    why = f"its loss is {loss:.4g}"
    if math.isfinite(loss):
        exploded = largest is not None and loss > largest
        why += f", above {largest:.4g} (recovery.loss_factor)" if exploded else " and a gradient is not finite"
    row = f"{len(position.in_a_row)} in a row, of {settings.skips} (recovery.skips)"
    return f"step {position.step} is left out, it changes nothing: {why}; {row}"


def is_due(settings: RecoverySettings, position: Position) -> bool:
    """Whether so many steps in a row were left out that the run has to roll back."""
    return len(position.in_a_row) >= settings.skips


def roll_back(
    settings: RecoverySettings, position: Position, checkpoints: Checkpoints, global_batch: int
) -> tuple[Position, str]:
    """Take up the newest whole checkpoint from before the steps that were left out; all ranks together.

    Returns:
        Where the run stands now, and a line for the user.

    Raises:
        Diverged: no roll-back is left, or there is no checkpoint; one line that says what to try.
    """
    count, shown = len(position.in_a_row), ", ".join("not finite" if x is None else f"{x:.4g}" for x in position.in_a_row)
    happened = f"steps {position.step - count + 1} to {position.step} were left out (losses {shown})"
    advice = "a lower optimizer.lr may help, in another output, which training.warm_start can begin with these weights"
    if len(position.rolled_back) >= settings.rollbacks:
        raise Diverged(
            f"{happened}, and the run has rolled back as often as recovery.rollbacks allows ({settings.rollbacks}): "
            f"{advice}; a larger recovery.rollbacks goes past more data"
        )
    try:
        found = checkpoints.take_up_before(position.step - count, position.step)
    except ValueError as error:
        raise Diverged(f"{happened}, and the run cannot roll back: {error}") from error
    if found is None:
        raise Diverged(f"{happened}, and there is no checkpoint before them to roll back to: {advice}, or a smaller training.save_every")
    passed_over = position.step + position.passed_over - found.step
    samples = [(step + over) * global_batch for step, over in ((found.step, found.passed_over), (position.step, position.passed_over))]
    event = {
        "from_step": position.step,
        "to_step": found.step,
        "samples_passed_over": samples,
        "losses": position.in_a_row,
    }
    new = replace(found, passed_over=passed_over, rolled_back=[*position.rolled_back, event], in_a_row=[])
    return new, (
        f"rolled back from step {position.step} to {found.step}, {len(new.rolled_back)} of {settings.rollbacks} times "
        f"(recovery.rollbacks), and past samples {samples[0]:,} to {samples[1] - 1:,} of the run's order"
    )
