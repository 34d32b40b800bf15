"""A run of many ranks without the ranks: what each would hold, read and write, made by the code of a run, and checked.

`rehearsal.py` calls the parts; each raises a ConfigError of one line where something is not as it has to be.
"""
