"""Notes about what was read: one line each on standard error, and each only once.

"Once" includes worker processes: whichever process has a note first prints it. They agree by a
folder with one empty file per note, which the main process makes and names in the environment.
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
_SAID: set[str] = set()


def say_once(text: str) -> None:
    """Prints a note unless this process, its workers or its parent printed it before.

    A worker process prints only if its parent called `share_with_workers` before it started.
    """
    with _LOCK:
        if text in _SAID:
            return
        _SAID.add(text)
    folder = os.environ.get(_FOLDER)
    if folder is None:
        is_first = multiprocessing.parent_process() is None
    else:
        is_first = _mark(folder, text)
    if is_first:
        print(f"note: {' '.join(text.split())}", file=sys.stderr, flush=True)


def share_with_workers() -> None:
    """Lets the worker processes that are started from now on print notes, each once for all."""
    with _LOCK:
        if _FOLDER in os.environ:
            return
        folder = tempfile.mkdtemp(prefix="moss_tok_notes_")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for text in _SAID:
            _mark(folder, text)
        os.environ[_FOLDER] = folder


def forget() -> None:
    """Allows all notes to be printed again, once."""
    with _LOCK:
        _SAID.clear()
        if folder := os.environ.get(_FOLDER):
            for path in Path(folder).glob("*"):
                path.unlink(missing_ok=True)


def _mark(folder: str, text: str) -> bool:
    """Whether no process has marked the note yet; it is marked afterwards."""
    name = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    try:
        Path(folder, name).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the folder is gone: the process that made it has ended
        pass
    return True
