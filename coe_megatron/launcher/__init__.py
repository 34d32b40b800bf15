"""Starts ranks on one host or several, and checks nodes before a run. Without torch, except `node_check`."""
