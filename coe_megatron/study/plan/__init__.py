"""From a study file to arms and what they cost. Without torch."""
