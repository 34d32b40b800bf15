"""Runs under SLURM: jobs, attempts and requeues, failures of ranks, spare nodes. Without torch."""

from pathlib import Path

SCRIPTS = Path(__file__).with_name("scripts")  # launch/slurm/ of the repository, also in an installed package
