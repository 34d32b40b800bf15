"""Starts ranks on one host or several, and looks at nodes beforehand. Without torch."""
