"""Runs the main function of an example; an error that the user can mend is printed as one line."""

import sys
from collections.abc import Callable

from moss_tok.errors import user_error


def run(main: Callable[[], None]) -> None:
    """Calls `main`; ends with one line and exit code 2 on such an error."""
    try:
        main()
    except Exception as error:
        line = user_error(error, "take shorter audio or a smaller batch")
        if not line:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
