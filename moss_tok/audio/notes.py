"""Notes about what was read: one line each on standard error, and each only once."""

import multiprocessing
import sys
import threading

_LOCK = threading.Lock()
_SAID: dict[str, None] = {}


def say_once(text: str) -> None:
    """Prints a note unless it was printed before.

    Worker processes keep their notes (`taken`) for the process that started them, which says each
    once for all of them.
    """
    with _LOCK:
        if text in _SAID:
            return
        _SAID[text] = None
    if multiprocessing.parent_process() is None:
        print(f"note: {' '.join(text.split())}", file=sys.stderr, flush=True)


def forget() -> None:
    """Begins anew: what was said may be said again, once."""
    with _LOCK:
        _SAID.clear()


def taken() -> list[str]:
    """The notes of this process so far, to be passed on to the process that started it."""
    with _LOCK:
        return list(_SAID)
