"""Names of files and folders, on this machine or in a bucket of Google Cloud Storage (gs://)."""

import contextlib
import fnmatch
import functools
import glob
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from typing import Any

from etils import epath

Path = pathlib.Path | epath.Path

_PREFIX = "gs://"
_LOST_AND_FOUND = "lost+found"  # of ext4, for root alone
_POINTER = b"version https://git-lfs"
_ADDRESS = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:/|://")  # gs:/x is a slip, not a folder gs:


def to_path(name: str | Path) -> Path:
    """A path to use like a `pathlib.Path`, whichever of the two it is.

    Raises:
      ValueError: Another kind of address, or a bucket that cannot be reached.
    """
    name = os.fspath(name)
    if not _ADDRESS.search(name):
        return pathlib.Path(name)
    if not name.startswith(_PREFIX):
        raise ValueError(f"{name}: must be a path, or an address that begins with {_PREFIX}")
    bucket = without_prefix(name).partition("/")[0]
    reason = _unreachable(bucket)
    if reason:
        raise ValueError(f"{name}: {reason}")
    return epath.Path(name)


def to_local_path(name: str | Path) -> pathlib.Path:
    """The path of a file or folder on this machine; ValueError for an address."""
    if _ADDRESS.search(os.fspath(name)):
        raise ValueError(f"{name}: has to be on this machine")
    return pathlib.Path(name)


def is_remote(path: str | Path) -> bool:
    """Whether it is in a bucket."""
    return os.fspath(path).startswith(_PREFIX)


def without_prefix(path: str | Path) -> str:
    """Bucket and name of an address."""
    return os.fspath(path).removeprefix(_PREFIX)


@functools.cache
def _unreachable(bucket: str) -> str:
    """Why a bucket cannot be used; empty if it can."""
    if importlib.util.find_spec("gcsfs") is None:
        return "needs gcsfs, pip install 'moss_tok[gcs]'"
    import fsspec

    # What was listed once is not true for long: other processes write there too.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    try:
        exists = epath.Path(f"{_PREFIX}{bucket}").exists()
    except Exception as error:  # of gcsfs, google.auth or aiohttp
        return f"cannot be reached ({_line(error)})"
    return "" if exists else f"there is no bucket {bucket!r}, or no permission to list it"


@contextlib.contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
    """Errors of a bucket, which share no base class, become a ValueError that names `path`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) or not is_remote(path):
            raise
        raise ValueError(f"{path}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def absolute(path: Path) -> epath.Path:
    """The absolute path, for Orbax."""
    return epath.Path(path if is_remote(path) else pathlib.Path(path).absolute())


def join(folder: Path, name: str) -> Path:
    """`name` relative to `folder`, unless it is an address or absolute."""
    return to_path(name) if "://" in name else folder / name


def find(pattern: str) -> list[Path]:
    """What a glob pattern names, sorted."""
    if not is_remote(pattern):
        return sorted(_find_local(pattern))
    return sorted(to_path(f"{_PREFIX}{name}") for name in _buckets().glob(pattern))


def _find_local(pattern: str) -> list[pathlib.Path]:
    parts = pathlib.Path(pattern).parts
    if "**" not in parts:
        return list(map(pathlib.Path, glob.glob(pattern)))
    # Not by `glob`, which would follow links that go in circles.
    number = parts.index("**")
    found = []
    for top in glob.glob(os.path.join(*parts[:number])) if number else [os.curdir]:
        for path in files_under(pathlib.Path(top)):
            if _matches(path.relative_to(top).parts, parts[number:]):
                found.append(path)
    return found


def _matches(parts: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    """Whether the parts of a path match those of a pattern; "**" are any folders."""
    if not wanted:
        return not parts
    if wanted[0] == "**" and _matches(parts, wanted[1:]):
        return True
    if not parts or (parts[0].startswith(".") and not wanted[0].startswith(".")):
        return False
    if wanted[0] == "**":
        return _matches(parts[1:], wanted)
    return fnmatch.fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])


def files_under(folder: Path) -> list[Path]:
    """All files in a folder and the folders in it, sorted.

    Links are followed, but into no folder twice: they may go in circles. Links to nothing are
    listed, too, so that whoever reads them says what is missing.

    Raises:
      OSError: A folder that cannot be read.
    """
    if not is_remote(folder):
        return _local_files_under(pathlib.Path(folder))
    names = _buckets().find(os.fspath(folder))
    return sorted(epath.Path(f"{_PREFIX}{name}") for name in names)


def _local_files_under(top: pathlib.Path) -> list[pathlib.Path]:
    found = []
    seen = set()
    tops = [str(top)]
    while tops:
        links = []  # to folders: later, so that a folder is listed under its own name
        for start in tops:
            for folder, folders, names in os.walk(start, onerror=_raise):
                stat = os.stat(folder)
                if (stat.st_dev, stat.st_ino) in seen:
                    folders.clear()
                    continue
                seen.add((stat.st_dev, stat.st_ino))
                for name in names:
                    path = os.path.join(folder, name)
                    if os.path.isfile(path) or os.path.islink(path):
                        found.append(pathlib.Path(path))
                folders[:] = [name for name in folders if name != _LOST_AND_FOUND]
                paths = [os.path.join(folder, name) for name in folders]
                links += [path for path in paths if os.path.islink(path)]
        tops = sorted(links)
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _buckets() -> Any:
    import gcsfs

    return gcsfs.GCSFileSystem()


def size_bytes(path: Path) -> int:
    """Size of a file."""
    return epath.Path(path).stat().length


def name_bytes(name: str | Path) -> bytes:
    """The bytes of a file's name, in any locale.

    Raises:
      UnicodeEncodeError: No file can be called so.
    """
    return os.fspath(name).encode("utf-8", "surrogateescape")


def printable(name: str | Path) -> str:
    """A file's name as UTF-8: bytes of it that are none become escapes."""
    return name_bytes(name).decode("utf-8", "backslashreplace")


def pointer_hint(path: str | pathlib.Path) -> str:
    """What to do about a file of this machine that git-lfs has not fetched; "" for other files."""
    try:
        with open(path, "rb") as file:
            is_pointer = file.read(len(_POINTER)) == _POINTER
    except OSError:
        return ""
    return "this is a git-lfs pointer: run `git lfs pull`" if is_pointer else ""


def check_writable(folder: pathlib.Path) -> None:
    """Raises OSError, which names the folder, unless files can be written there."""
    with tempfile.TemporaryFile(dir=folder):
        pass


def set_mode(path: str | pathlib.Path) -> None:
    """Gives a file that was made for the owner alone the mode of other new files."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def remove_folder(path: Path) -> None:
    """Removes a folder and all in it, as far as that is possible."""
    try:
        epath.Path(path).rmtree(missing_ok=True)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)


class Mirror:
    """A folder that programs write in which know no buckets, and its copy in one.

    Attributes:
      local: Where to write. A folder of this machine is its own mirror.
    """

    def __init__(self, folder: Path):
        self._folder, self._sent = folder, {}
        self.local = pathlib.Path(folder)
        if is_remote(folder):
            self.local = pathlib.Path(tempfile.mkdtemp(prefix="moss_tok-"))
            weakref.finalize(self, shutil.rmtree, self.local, ignore_errors=True)

    def fetch(self, *names: str) -> None:
        """Copies files from the bucket, as far as they exist."""
        if not is_remote(self._folder):
            return
        for name in names:
            with named_errors(self._folder / name):
                if (self._folder / name).exists():
                    (self.local / name).write_bytes((self._folder / name).read_bytes())

    def send(self) -> None:
        """Copies to the bucket what has changed."""
        if not is_remote(self._folder):
            return
        for path in files_under(self.local):
            name, stat = path.relative_to(self.local), path.stat()
            state = (stat.st_mtime_ns, stat.st_size)
            if self._sent.get(name) != state:
                with named_errors(self._folder / name):
                    (self._folder / name).write_bytes(path.read_bytes())
                self._sent[name] = state
