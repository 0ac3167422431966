"""The `caravan` command: starts and supervises everything on one machine, and talks to it."""
