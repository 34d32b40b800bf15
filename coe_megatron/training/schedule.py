"""The learning rate of a step, as a closed form of the step alone: resuming needs no state of it."""

from coe_megatron.config.settings import OptimizerSettings


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """The rate of step `step` (0-based) of `steps`.

    Linear warm-up over the first `warmup` share of the steps, then constant, or linear down towards `min_lr`, which
    the step after the last would have: neither the first nor the last step is idle.
    """
    warmup = round(settings.warmup * steps)
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    if settings.decay == "constant":
        return settings.lr
    left = (steps - step) / (steps - warmup)
    return settings.min_lr + (settings.lr - settings.min_lr) * left
