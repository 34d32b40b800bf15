"""The folder of a run: its lock, contents and readers. Without torch."""
