"""Pretrains as launch/pretrain_coe.py does, on a pretended device and disk whose times hardly depend on other load.

The environment variable COE_PACE has two numbers of seconds: how long a step takes at least, since the process sleeps
for the rest of it, and how long it sleeps when it writes a checkpoint, in the background if that is written there.
"""

import os
import sys
import time
from typing import Any

from coe_megatron.cli.pretrain import main
from coe_megatron.lean_imports import import_megatron
from coe_megatron.training.console import quiet_libraries


def pace(step: float, write: float) -> None:
    """Replace the loop's step and the writing of checkpoints in this process."""
    quiet_libraries()
    import_megatron()
    from coe_megatron.checkpoint import save_load
    from coe_megatron.training import loop

    train_step, write_checkpoint = loop.train_step, save_load._write

    def paced_step(*args: Any, **named: Any) -> Any:
        began = time.perf_counter()
        loss = train_step(*args, **named)
        time.sleep(max(0.0, step + began - time.perf_counter()))
        return loss

    def slow_write(*args: Any, **named: Any) -> None:
        time.sleep(write)
        write_checkpoint(*args, **named)

    loop.train_step, save_load._write = paced_step, slow_write


if __name__ == "__main__":
    pace(*map(float, os.environ["COE_PACE"].split()))
    sys.exit(main())
