"""A run's folder: who may write, what it holds, how it is read back. Without torch."""
