"""The command line, `moss-tok`: one file per command, imported only when the command runs."""
