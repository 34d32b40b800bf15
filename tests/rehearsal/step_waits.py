"""Notes what made the host wait in each step of pretraining; imported after the loop, beside `pretended`.

With MISTAKE in a program's environment each step reads its numbers twice.
"""

import os
from collections import Counter

import pretended

from coe_megatron.training import loop
from coe_megatron.training.loop import Pretraining

_train_step, _read, _before = Pretraining._train_step, loop.read, Counter[str]()


def _noting(self: Pretraining, step: int) -> object:
    """A step with its logging: from one call to the next."""
    global _before
    now = Counter(pretended._log["syncs"])
    pretended._log.setdefault("steps", []).append(now - _before)
    _before = now
    if "MISTAKE" in os.environ:
        loop.read = lambda *numbers: _read(*numbers) and _read(*numbers)
    return _train_step(self, step)


Pretraining._train_step = _noting
