"""The public names of moss_tok.data and where they are defined."""

from .codes import read_codes as read_codes
