"""The learning rate of a step, as a closed form of the step alone: resuming needs no state of it."""

import math

from coe_megatron.config.settings import OptimizerSettings


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """The rate of step `step` (0-based) of `steps`.

    Linear warm-up over the first `warmup` share of the steps, then what `decay` names. Where the rate falls, the step
    after the last would have `min_lr`: neither the first nor the last step is idle.
    """
    warmup = round(settings.warmup * steps)
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    falling_from = {
        "constant": steps,
        "linear": warmup,
        "cosine": warmup,
        "wsd": max(warmup, steps - round(settings.cooldown * steps)),
    }[settings.decay]
    if step < falling_from:
        return settings.lr
    left = (steps - step) / (steps - falling_from)
    if settings.decay == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return settings.min_lr + (settings.lr - settings.min_lr) * left
