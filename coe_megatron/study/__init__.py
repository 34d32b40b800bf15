"""Studies: many runs that answer one question, from a file that says what is compared. Planning needs no torch."""
