"""Progress of a run, shown by rank 0: a bar on a terminal, plain lines in a log file.

Errors from writing to the log (a full disk) are ignored.
"""

import sys
import time
from contextlib import suppress
from datetime import timedelta

from tqdm import tqdm


class Progress:
    """Progress over the steps of a run, on stderr.

    Args:
        first_step, steps: number of steps done, and of all steps.
        visible: False on ranks other than 0.
    """

    def __init__(self, first_step: int, steps: int, visible: bool) -> None:
        self._visible, self._steps, self._first, self._start = visible, steps, first_step, time.monotonic()
        self._bar = None
        if visible and sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)

    def step(self, step: int, logged: dict[str, float] | None) -> None:
        """Show progress after step `step` (1-based; 0 before the first); `logged` has the values of a logged step."""
        if self._bar is not None:
            self._bar.update(step > self._first)
            if logged:
                self._bar.set_postfix_str(_text(logged))
        elif self._visible and logged:
            eta = f"  eta {timedelta(seconds=round(self.eta_seconds(step)))}" if step > self._first else ""
            with suppress(OSError):
                print(f"step {step}/{self._steps}  {_text(logged)}{eta}", file=sys.stderr)

    def eta_seconds(self, step: int) -> float:
        """Estimated remaining seconds after step `step`, from the time since the start (with evaluations and saves)."""
        return (time.monotonic() - self._start) / (step - self._first) * (self._steps - step)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._visible:
            with suppress(OSError):
                tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _text(logged: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in logged.items())
