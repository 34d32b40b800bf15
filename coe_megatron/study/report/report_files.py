"""Reads the CSV files of a report, so that claims can be judged without the folders of runs."""

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coe_megatron.errors import ConfigError
from coe_megatron.files import kind_of, problem, read_limited
from coe_megatron.study.plan.names import listed
from coe_megatron.study.report.results import cell
from coe_megatron.text import shortened

_MAX_BYTES = 1 << 26
_AXIS = "axis_"
_SEED = re.compile(r"[0-9]{1,19}")


@dataclass(frozen=True)
class Arm:
    """An arm of a report: its name, and its labels by axis as the CSV has them."""

    name: str
    labels: Mapping[str, str]

    @property
    def title(self) -> str:
        """Its labels."""
        return " ".join(self.labels.values())


@dataclass(frozen=True)
class ReportFiles:
    """The rows of a report.

    Attributes:
        path: results.csv.
        arms: all arms, in order.
        rows: columns of results.csv and timings.csv by arm and seed; of unfinished runs, without losses.
    """

    path: Path
    arms: Sequence[Arm]
    rows: Mapping[tuple[str, int], Mapping[str, str]]

    def find(self, where: str, labels: Mapping[str, Any], wanted: str | Mapping[str, Any]) -> Arm:
        """The arm with all labels, of which a wanted one may come without its axis.

        Raises:
            ConfigError: there is no such arm, or more than one; one line that begins with `where`.
        """
        axes = {**labels, **(wanted if isinstance(wanted, Mapping) else {})}
        known = self.arms[0].labels if self.arms else {}
        if unknown := next((axis for axis in axes if axis not in known), None):
            raise ConfigError(f"{where} names the axis {shortened(unknown, 100)!r}: {self.path} has {listed(known)}")
        found = [arm for arm in self.arms if all(arm.labels[axis] == cell(label) for axis, label in axes.items())]
        if isinstance(wanted, str):
            found = [arm for arm in found if cell(wanted) in (arm.name, *arm.labels.values())]
        if len(found) == 1:
            return found[0]
        count = "no arm" if not found else f"{len(found)} arms"
        shown = wanted if isinstance(wanted, str) else " ".join(map(str, axes.values()))
        raise ConfigError(
            f"{where} is {shortened(shown, 100)!r}: {self.path} has {count} like that; its arms are "
            f"{listed(arm.title for arm in self.arms)}"
        )

    def values(self, arm: Arm, column: str) -> dict[int, float]:
        """A column by seed, of the finished runs of an arm that have it.

        Raises:
            ConfigError: a value is not a finite number.
        """
        found = {}
        for (name, seed), row in self.rows.items():
            if name == arm.name and row.get("state") == "finished" and (text := row.get(column)):
                found[seed] = self._number(text, f"arm {name}, seed {seed}: {column}")
        return found

    def _number(self, text: str, where: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not abs(value) < 1e18:
            raise problem(self.path, "the report", f"{where} is {shortened(text, 100)!r}: it must be a number")
        return value


def read_report(folder: Path) -> ReportFiles | None:
    """Read a report; None if there is none yet.

    Raises:
        ConfigError: a file is damaged; one line that names it.
    """
    path = folder / "results.csv"
    if kind_of(path, "the report") is None:
        return None
    arms: dict[str, Arm] = {}
    rows: dict[tuple[str, int], dict[str, str]] = {}
    for key, row in _rows(path):
        labels = {name.removeprefix(_AXIS): label for name, label in row.items() if name.startswith(_AXIS)}
        arms.setdefault(key[0], Arm(key[0], labels))
        rows[key] = row
    timings = folder / "timings.csv"
    for key, row in _rows(timings) if kind_of(timings, "the report") is not None else ():
        if key in rows:
            rows[key] = row | rows[key]
    return ReportFiles(path, list(arms.values()), rows)


def _rows(path: Path) -> Iterator[tuple[tuple[str, int], dict[str, str]]]:
    """The rows of a CSV file by arm and seed."""
    text = read_limited(path, "the report", _MAX_BYTES).decode(errors="replace")
    seen = set()
    try:
        for row in csv.DictReader(io.StringIO(text, newline=""), restkey="", restval="", strict=True):
            if "" in row or not row.get("arm") or not _SEED.fullmatch(row.get("seed", "")):
                raise problem(path, "the report", "it is damaged: a row has no arm, no seed, or too many cells")
            if (key := (row["arm"], int(row["seed"]))) in seen:
                raise problem(path, "the report", f"arm {shortened(key[0], 100)} has seed {key[1]} twice")
            seen.add(key)
            yield key, row
    except csv.Error as error:
        raise problem(path, "the report", f"it is damaged: {error}") from None
