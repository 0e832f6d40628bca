"""Runs the main function of an example; an error that the user can fix is printed as one line."""

import sys
from collections.abc import Callable

from moss_tok.errors import exit_code


def run(main: Callable[[], None]) -> None:
    """Calls `main`; ends with one line and exit code 2 on such an error."""
    code = exit_code(main, "take shorter audio or a smaller batch")
    if code:
        sys.exit(code)
