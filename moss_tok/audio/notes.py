"""Notes about files that were read: one line each on standard error, and each only once.

This holds across worker processes: the first process that has a note prints it. To know which one
is first, they share a folder with one empty file per note. The main process creates the folder and
gives its name in an environment variable.
"""

import atexit
import hashlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path

_FOLDER = "MOSS_TOK_NOTES"  # environment variable
_LOCK = threading.Lock()
_PRINTED: set[str] = set()


def say_once(text: str) -> None:
    """Prints a note unless this process, its workers or its parent printed it before.

    A worker process prints only if its parent called `share_with_workers` before it started.
    """
    with _LOCK:
        if text in _PRINTED:
            return
        _PRINTED.add(text)
    folder = os.environ.get(_FOLDER)
    if folder is None:
        is_first = multiprocessing.parent_process() is None
    else:
        is_first = _mark(folder, text)
    if is_first:
        print(f"note: {' '.join(text.split())}", file=sys.stderr, flush=True)


def share_with_workers() -> None:
    """Shares the notes with worker processes that are started later, so that these print, too.

    Each note is still printed only once, by one of the processes.
    """
    with _LOCK:
        if _FOLDER in os.environ:
            return
        folder = tempfile.mkdtemp(prefix="moss_tok_notes_")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for text in _PRINTED:
            _mark(folder, text)
        os.environ[_FOLDER] = folder


def forget() -> None:
    """Allows all notes to be printed again, once."""
    with _LOCK:
        _PRINTED.clear()
        folder = os.environ.get(_FOLDER)
        if folder is None:
            return
        for path in Path(folder).glob("*"):
            path.unlink(missing_ok=True)


def _mark(folder: str, text: str) -> bool:
    """Marks a note as printed; returns False if a process has marked it before."""
    name = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    try:
        Path(folder, name).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the folder is gone: the process that made it has ended
        pass
    return True
