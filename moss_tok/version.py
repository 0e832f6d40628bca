"""The version of moss_tok. `setup.py` reads it from this file."""

__version__ = "0.1.0"
