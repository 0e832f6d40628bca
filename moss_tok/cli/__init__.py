"""The command line, `moss-tok`: one file per command, imported when it is called."""
