"""The `shoal` command: one file a command, heavy imports inside the commands."""
