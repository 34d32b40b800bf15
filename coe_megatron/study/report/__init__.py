"""The report of a study: tables, tests, figures."""
