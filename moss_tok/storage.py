"""Paths of files and folders, on this machine or in a bucket of Google Cloud Storage (gs://)."""

import contextlib
import fnmatch
import functools
import glob
import logging
import os
import pathlib
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from typing import Any, TypeAlias

from etils import epath

from moss_tok import extras

Path: TypeAlias = pathlib.Path | epath.Path

_PREFIX = "gs://"
_LOST_AND_FOUND = "lost+found"  # folder of ext4 that only root can read
_POINTER = b"version https://git-lfs"
# It also matches gs:/x, which is a typo and not a folder called "gs:".
_ADDRESS = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:/|://")


def to_path(name: str | Path) -> Path:
    """Returns a path that can be used like a `pathlib.Path`, local or in a bucket.

    Raises:
      ValueError: `name` is another kind of address, or its bucket cannot be reached.
    """
    name = os.fspath(name)
    if not _ADDRESS.search(name):
        return pathlib.Path(name)
    if not name.startswith(_PREFIX):
        raise ValueError(f"{name}: must be a path, or an address that starts with {_PREFIX}")
    bucket = without_prefix(name).partition("/")[0]
    reason = _unreachable(bucket)
    if reason:
        raise ValueError(f"{name}: {reason}")
    return epath.Path(name)


def to_local_path(name: str | Path) -> pathlib.Path:
    """The path of a file or folder on this machine; ValueError for an address."""
    if _ADDRESS.search(os.fspath(name)):
        raise ValueError(f"{name}: must be on this machine")
    return pathlib.Path(name)


def is_remote(path: str | Path) -> bool:
    """Whether a path is in a bucket."""
    return os.fspath(path).startswith(_PREFIX)


def without_prefix(path: str | Path) -> str:
    """The address without "gs://": the bucket and the name in it."""
    return os.fspath(path).removeprefix(_PREFIX)


@functools.cache
def _unreachable(bucket: str) -> str:
    """The reason why a bucket cannot be used; "" if it can."""
    if not extras.is_installed("gcsfs"):
        return f"needs gcsfs, {extras.install('gcs')}"
    import fsspec

    # Cached listings would become wrong, because other processes write there too.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    # It prints a traceback for each error that it also raises, which we print as one line.
    logging.getLogger("gcsfs").addFilter(lambda record: record.exc_info is None)
    try:
        exists = epath.Path(f"{_PREFIX}{bucket}").exists()
    except Exception as error:  # from gcsfs, google.auth or aiohttp
        return f"cannot be reached ({_line(error)})"
    return "" if exists else f"bucket {bucket!r} does not exist, or may not be listed"


@contextlib.contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
    """Converts errors of a bucket, which share no base class, to a ValueError that names `path`."""
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
    """Paths that match a glob pattern, sorted."""
    if not is_remote(pattern):
        return sorted(_find_local(pattern))
    return sorted(to_path(f"{_PREFIX}{name}") for name in _buckets().glob(pattern))


def _find_local(pattern: str) -> list[pathlib.Path]:
    parts = pathlib.Path(pattern).parts
    if "**" not in parts:
        return list(map(pathlib.Path, glob.glob(pattern)))
    # `glob` would follow circular links for "**", so `files_under` lists the folders instead.
    number = parts.index("**")
    tops = [os.curdir]
    if number > 0:
        tops = glob.glob(os.path.join(*parts[:number]))
    paths = []
    for top in tops:
        for path in files_under(pathlib.Path(top)):
            if _matches(path.relative_to(top).parts, parts[number:]):
                paths.append(path)
    return paths


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the parts of a path match those of a pattern; "**" matches any number of folders."""
    if not pattern:
        return not parts
    first, *following = pattern
    following = tuple(following)
    if first == "**" and _matches(parts, following):
        return True
    if not parts:
        return False
    if parts[0].startswith(".") and not first.startswith("."):
        return False
    if first == "**":
        return _matches(parts[1:], pattern)
    return fnmatch.fnmatchcase(parts[0], first) and _matches(parts[1:], following)


def files_under(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders, sorted.

    Links are followed, but no folder is entered twice, because links may be circular. Links to
    missing files are listed, too: reading them then raises an error that names the file.

    Raises:
      OSError: A folder cannot be read.
    """
    if not is_remote(folder):
        return _local_files_under(pathlib.Path(folder))
    names = _buckets().find(os.fspath(folder))
    return sorted(epath.Path(f"{_PREFIX}{name}") for name in names)


def _local_files_under(top: pathlib.Path) -> list[pathlib.Path]:
    files = []
    visited = set()  # device and inode of folders
    tops = [str(top)]
    while tops:
        # Links to folders are followed last, so that files are listed under the folder's own path.
        links = []
        for start in tops:
            for folder, folders, names in os.walk(start, onerror=_raise):
                stat = os.stat(folder)
                if (stat.st_dev, stat.st_ino) in visited:
                    folders.clear()
                    continue
                visited.add((stat.st_dev, stat.st_ino))
                for name in names:
                    path = os.path.join(folder, name)
                    if os.path.isfile(path) or os.path.islink(path):
                        files.append(pathlib.Path(path))
                folders[:] = [name for name in folders if name != _LOST_AND_FOUND]
                for name in folders:
                    path = os.path.join(folder, name)
                    if os.path.islink(path):
                        links.append(path)
        tops = sorted(links)
    return sorted(files)


def _raise(error: OSError) -> None:
    raise error


def _buckets() -> Any:
    import gcsfs

    return gcsfs.GCSFileSystem()


def size_bytes(path: Path) -> int:
    """Size of a file."""
    return epath.Path(path).stat().length


def name_bytes(name: str | Path) -> bytes:
    """The bytes of a file's name, independent of the locale.

    Raises:
      UnicodeEncodeError: No file can have this name.
    """
    return os.fspath(name).encode("utf-8", "surrogateescape")


def printable(name: str | Path) -> str:
    """A file's name as valid text: bytes that are not UTF-8 become escapes."""
    return name_bytes(name).decode("utf-8", "backslashreplace")


def pointer_hint(path: str | pathlib.Path) -> str:
    """A hint for a local file that git-lfs has not fetched yet; "" for other files."""
    try:
        with open(path, "rb") as file:
            is_pointer = file.read(len(_POINTER)) == _POINTER
    except OSError:
        return ""
    return "this is a git-lfs pointer: run `git lfs pull`" if is_pointer else ""


def check_writable(folder: pathlib.Path) -> None:
    """Raises an OSError that names the folder unless files can be written there."""
    with tempfile.TemporaryFile(dir=folder):
        pass


def set_mode(path: str | pathlib.Path) -> None:
    """Gives a file that only its owner can read the default mode of new files."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def remove_folder(path: Path) -> None:
    """Removes a folder and its contents. Files that cannot be removed stay; this is no error."""
    try:
        epath.Path(path).rmtree(missing_ok=True)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)


class Mirror:
    """A local folder whose files are copied to a bucket, for libraries that only write locally.

    Attributes:
      local: The folder to write to; `folder` itself if that is on this machine.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._sent = {}
        self.local = pathlib.Path(folder)
        if is_remote(folder):
            self.local = pathlib.Path(tempfile.mkdtemp(prefix="moss_tok-"))
            weakref.finalize(self, shutil.rmtree, self.local, ignore_errors=True)

    def fetch(self, *names: str) -> None:
        """Copies the files that exist from the bucket."""
        if not is_remote(self._folder):
            return
        for name in names:
            with named_errors(self._folder / name):
                if (self._folder / name).exists():
                    (self.local / name).write_bytes((self._folder / name).read_bytes())

    def send(self) -> None:
        """Copies files that changed since the last call to the bucket."""
        if not is_remote(self._folder):
            return
        for path in files_under(self.local):
            name = path.relative_to(self.local)
            stat = path.stat()
            state = (stat.st_mtime_ns, stat.st_size)
            if self._sent.get(name) != state:
                with named_errors(self._folder / name):
                    (self._folder / name).write_bytes(path.read_bytes())
                self._sent[name] = state
