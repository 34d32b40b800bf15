"""Starts the runs of a study, on this host or as SLURM job arrays. Does not import torch."""
