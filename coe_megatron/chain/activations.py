"""Closed forms."""

from typing import Literal

Recompute = Literal["none", "experts", "iteration", "layer"]
