"""Templates of the built-in corpus: each family lists its own in `TEMPLATES`; `stories` are composed of parts."""
