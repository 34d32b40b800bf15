"""Data: the built-in corpus, tokenizers, preparation into Megatron's indexed datasets, and batches for training.

`datasets` and `run_data` import torch, the other modules do not. Nothing here starts or needs process groups,
but if several ranks open a packed dataset, rank 0 builds its index first.
"""
