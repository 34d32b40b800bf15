"""Runs under SLURM: attempts and requeues, failures of ranks, spare nodes. Without torch."""
