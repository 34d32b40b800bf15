"""Data: the built-in corpus, tokenizers, preparation into Megatron's indexed datasets, and batches for training.

`datasets` and `run_data` need torch to import, the rest does not. Nothing here starts or needs process groups,
but a packed dataset opened under several ranks lets rank 0 build its index first.
"""
