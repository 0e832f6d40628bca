"""What can be trained: a file for each objective, and `config.py` with all settings."""
