"""What a run will cost, from its config alone: no torch, no data, no second rank. Behind `--dry-run`."""
