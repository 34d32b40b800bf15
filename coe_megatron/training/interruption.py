"""Ctrl-C and SIGTERM without loss: the first asks a run to stop after the step at hand, the second ends it at once."""

import signal
from types import FrameType


class Interruption:
    """Notes SIGINT and SIGTERM from its making until `forget`; each rank has its own and they agree in the step."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.asked = False
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def forget(self) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        self.forget()
