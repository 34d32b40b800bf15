"""What a cluster makes of a run: the layout to take, and what it survives. Without torch."""
