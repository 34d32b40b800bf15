"""Predicts the cost of a run from its config, for `--dry-run`; needs no torch, no data and no other rank."""
