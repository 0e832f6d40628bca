"""Training objectives: a module for each, and `config.py` with the settings of all."""
