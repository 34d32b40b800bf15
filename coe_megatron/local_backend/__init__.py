"""Replacements for Transformer Engine and CUDA: experts, attention, norms, and patches of Megatron-Core."""
