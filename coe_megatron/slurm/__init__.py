"""What stands between a run and the machines it runs on: jobs, attempts, failures. Without torch."""

from pathlib import Path

SCRIPTS = Path(__file__).with_name("scripts")  # launch/slurm/ of the repository, also in an installed package
