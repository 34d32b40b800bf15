"""The plan of a study: study file, arms, and predicted costs. Does not import torch."""
