"""The two files that an export of a chain brings along. They import torch and transformers alone."""
