"""The runs of a study: started here or as SLURM arrays. Without torch."""
