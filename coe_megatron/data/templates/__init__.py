"""Templates of the built-in corpus, by family; each module lists its own in `TEMPLATES`."""
