"""What the runs of a study came to: tables, tests, figures."""
