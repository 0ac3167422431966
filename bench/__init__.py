"""Every speed claim of the project, as a command: `python -m bench.NAME` prints a table."""
