"""A window of steps under torch's profiler, by option: a trace, a table of operators, a snapshot of CUDA's memory."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from coe_megatron.config.settings import ProfileSettings

_ROWS = 40  # of the table
_ALLOCATIONS = 200_000  # that a memory snapshot goes back


class ProfileWindow:
    """Watches the steps that the settings name, on the ranks that they name.

    When the window closes, `trace-rank00000.json.gz` (for Perfetto or TensorBoard), `operators-rank00000.txt` (by
    their own time) and, if asked and on CUDA, `memory-rank00000.pickle` (for torch's memory viewer) are in the folder.

    Args:
        folder: where to write; made when the window opens.
        rank: this rank.
    """

    def __init__(self, settings: ProfileSettings, folder: Path, rank: int) -> None:
        self._settings, self._folder, self._rank = settings, folder, rank
        self._profile: profile | None = None
        self._mark: record_function | None = None  # of the step at hand
        first = settings.first_step if rank in settings.ranks else None
        self._window = range(0) if first is None else range(first, first + settings.steps)

    def before_step(self, step: int) -> None:
        """To be called before step `step` (1-based)."""
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
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        self._profile.start()

    def after_step(self, step: int) -> str | None:
        """To be called after step `step`; says where the files are, or why not, when the window has closed."""
        if self._profile is None or self._mark is None:
            return None
        self._mark.__exit__(None, None, None)
        if step + 1 in self._window:
            return None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profile.stop()
        watched, self._profile = self._profile, None
        try:
            self._write(watched)
        except (OSError, RuntimeError) as error:  # what training is for does not end for that
            return f"the profile of steps {self._window.start} to {step} is not written: {error}"
        return f"profile of steps {self._window.start} to {step} in {self._folder}"

    def _write(self, watched: profile) -> None:
        self._folder.mkdir(exist_ok=True)
        name = f"rank{self._rank:05d}"
        watched.export_chrome_trace(str(self._folder / f"trace-{name}.json.gz"))
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = watched.key_averages().table(sort_by=key, row_limit=_ROWS)
        (self._folder / f"operators-{name}.txt").write_text(table)
        if self._settings.memory and torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self._folder / f"memory-{name}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
