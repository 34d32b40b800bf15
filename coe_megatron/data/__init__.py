"""Data: the built-in corpus, tokenizers, preparation into Megatron's indexed datasets, and batches for training.

`corpus` and `prepare` need no torch to import; `datasets` needs it. Nothing here starts or needs process groups,
but a packed dataset opened under several ranks lets rank 0 build its index first.
"""
