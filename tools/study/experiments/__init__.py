"""The tasks of the study, the loop that trains them, and the grid that says what is run."""
