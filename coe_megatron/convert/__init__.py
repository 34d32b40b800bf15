"""Models and tokenizers in the formats of other programs, and a model made into a chain."""
