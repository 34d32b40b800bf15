"""What a person sees while a run goes on: a bar on a terminal, plain lines in a log file. Rank 0 alone shows it.

A log file on a full disk does not take them; that ends no run.
"""

import sys
import time
from contextlib import suppress
from datetime import timedelta

from tqdm import tqdm


class Progress:
    """Progress over the steps of a run, on stderr.

    Args:
        first_step, steps: where the run stands and where it ends.
        visible: False on ranks other than 0.
    """

    def __init__(self, first_step: int, steps: int, visible: bool) -> None:
        self._visible, self._steps, self._first, self._start = visible, steps, first_step, time.monotonic()
        self._bar = None
        if visible and sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)

    def step(self, step: int, logged: dict[str, float] | None) -> None:
        """After step `step` (1-based; 0 before the first); `logged` holds what to show where the step is logged."""
        if self._bar is not None:
            self._bar.update(step > self._first)
            if logged:
                self._bar.set_postfix_str(_text(logged))
        elif self._visible and logged:
            left = f"  left {timedelta(seconds=round(self.seconds_left(step)))}" if step > self._first else ""
            with suppress(OSError):
                print(f"step {step}/{self._steps}  {_text(logged)}{left}", file=sys.stderr)

    def seconds_left(self, step: int) -> float:
        """An estimate after step `step`, from the time since the start: evaluations and checkpoints are in it."""
        return (time.monotonic() - self._start) / (step - self._first) * (self._steps - step)

    def say(self, text: str) -> None:
        """A line of its own that does not tear the bar."""
        if self._visible:
            with suppress(OSError):
                tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _text(logged: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in logged.items())
