"""What stands in for Transformer Engine and for CUDA: experts, attention, norms, and the two compatibility parts."""
