"""Templates of the built-in corpus, by family, each listed in its module's `TEMPLATES`; `stories` are put together."""
