"""The learning rate as a function of the step alone, so that resuming needs no state."""

import math

from coe_megatron.config.settings import OptimizerSettings


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """The learning rate of step `step` (0-based) of `steps`.

    Linear warm-up over the first `warmup` fraction of the steps, then the schedule named by `decay`. The rate would
    be 0 one step before the first and, if it decays, `min_lr` one step after the last, so that no step is wasted.
    """
    warmup = round(settings.warmup * steps)
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    decay_start = {
        "constant": steps,
        "linear": warmup,
        "cosine": warmup,
        "wsd": max(warmup, steps - round(settings.cooldown * steps)),
    }[settings.decay]
    if step < decay_start:
        return settings.lr
    left = (steps - step) / (steps - decay_start)
    if settings.decay == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return settings.min_lr + (settings.lr - settings.min_lr) * left
