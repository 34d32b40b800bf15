"""Profile a window of steps with torch's profiler: a trace, a table of operators, a snapshot of CUDA memory."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from coe_megatron.config.settings import ProfileSettings

_TABLE_ROWS = 40
_MAX_ALLOCATIONS = 200_000  # in the history of a memory snapshot


class ProfileWindow:
    """Profiles the steps that the settings name, on the ranks that they name.

    After the last step it writes `trace-rank00000.json.gz` (for Perfetto or TensorBoard), `operators-rank00000.txt`
    (sorted by self time) and, if enabled and on CUDA, `memory-rank00000.pickle` (for torch's memory viewer).

    Args:
        folder: output folder, created when needed.
        rank: this rank.
    """

    def __init__(self, settings: ProfileSettings, folder: Path, rank: int) -> None:
        self._settings, self._folder, self._rank = settings, folder, rank
        self._profile: profile | None = None
        self._mark: record_function | None = None  # of the current step
        first = settings.first_step if rank in settings.ranks else None
        self._window = range(0) if first is None else range(first, first + settings.steps)

    def before_step(self, step: int) -> None:
        """Call this before step `step` (1-based)."""
        if step not in self._window:
            return
        if self._profile is None:
            self._start()
        self._mark = record_function(f"step {step}")
        self._mark.__enter__()

    def _start(self) -> None:
        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        memory = self._settings.memory
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *cuda], profile_memory=memory, record_shapes=memory, acc_events=True
        )
        if memory and cuda:
            torch.cuda.memory._record_memory_history(max_entries=_MAX_ALLOCATIONS)
        self._profile.start()

    def after_step(self, step: int) -> str | None:
        """Call this after step `step`; after the last one it returns a message on where the files are, or why not."""
        if self._profile is None or self._mark is None:
            return None
        self._mark.__exit__(None, None, None)
        if step + 1 in self._window:
            return None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profile.stop()
        finished, self._profile = self._profile, None
        try:
            self._write(finished)
        except (OSError, RuntimeError) as error:  # a missing profile does not end training
            return f"the profile of steps {self._window.start} to {step} was not written: {error}"
        return f"profile of steps {self._window.start} to {step} in {self._folder}"

    def _write(self, finished: profile) -> None:
        self._folder.mkdir(exist_ok=True)
        name = f"rank{self._rank:05d}"
        finished.export_chrome_trace(str(self._folder / f"trace-{name}.json.gz"))
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = finished.key_averages().table(sort_by=key, row_limit=_TABLE_ROWS)
        (self._folder / f"operators-{name}.txt").write_text(table)
        if self._settings.memory and torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self._folder / f"memory-{name}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
