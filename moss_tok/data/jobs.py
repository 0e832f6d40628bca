"""Work in shards that several processes share: one plan, and shards that appear when complete.

A folder of such work holds a file with the plan, the shards, and in `parts/` a file for each
finished shard with what its end needs to know. A run that was interrupted writes the shards that
are missing; a run with another plan is refused.
"""

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moss_tok import storage
from moss_tok.audio import files
from moss_tok.json_files import read_json_object

_PARTS = "parts"
_SILENT_SECONDS = 3600  # a process of another host counts as gone when its file is that old


def check_folder(folder: str | Path, plan_name: str) -> None:
    """Raises ValueError unless the work can go there: a new or empty folder, or one with a plan."""
    path = storage.to_local_path(folder)
    if not str(folder) or (path.exists() and not path.is_dir()):
        raise ValueError(f"output must be a folder, got {str(folder)!r}")
    names = {file.name for file in path.iterdir()} if path.exists() else set()
    # Another process may be about to write the plan.
    is_new = all(name.startswith(files.INCOMPLETE) for name in names)
    if plan_name not in names and not is_new:
        raise ValueError(f"{folder}: exists and is not empty, and has no {plan_name} to resume")


def begin(folder: Path, plan_name: str, plan: dict[str, Any], other: str) -> None:
    """Writes the plan, or checks that the folder has the same one.

    Args:
      folder: Of the work.
      plan_name: The file of the plan.
      plan: What has to be the same.
      other: What the error says that a folder with another plan holds.

    Raises:
      ValueError: The folder holds something else.
    """
    check_folder(folder, plan_name)
    path = folder / plan_name
    if path.exists():
        before = read_json_object(path)
        changes = []
        for key, value in plan.items():
            if before.get(key) != value:
                changes.append(f"{key} was {before.get(key)}, now {value}")
        if changes:
            raise ValueError(f"{folder} holds {other}: {'; '.join(changes)}")
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        files.write_text(path, json.dumps(plan, indent=2) + "\n")


def digest(parts: Iterable[Any]) -> str:
    """A short hash of JSON values, in their order."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return hashed.hexdigest()[:16]


def part_path(folder: Path, shard: str, suffix: str) -> Path:
    """The file in `parts/` of a shard."""
    return folder / _PARTS / f"{shard}{suffix}"


def is_done(folder: Path, shard: str, suffix: str) -> bool:
    """Whether a shard and its part are there."""
    return (folder / shard).exists() and part_path(folder, shard, suffix).exists()


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file of this process alone that becomes `path`, or nothing, when the block ends.

    Raises:
      ValueError: It cannot be written.
    """
    name = f"{files.INCOMPLETE}{path.name}@{socket.gethostname()}@{os.getpid()}"
    temporary = path.with_name(name)
    try:
        path.parent.mkdir(exist_ok=True)
        yield temporary
        temporary.rename(path)
    except (OSError, RuntimeError) as error:  # the latter of ArrayRecord, where disks are full
        raise ValueError(f"{path}: could not be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_abandoned(folder: Path) -> None:
    """Removes the `new_file`s of processes that are gone."""
    for path in folder.rglob(f"{files.INCOMPLETE}*@*@*"):
        with contextlib.suppress(FileNotFoundError):  # other processes remove them, too
            if _is_abandoned(path):
                path.unlink()


def _is_abandoned(path: Path) -> bool:
    _, host, process = path.name.rsplit("@", 2)
    if host != socket.gethostname():
        return time.time() - path.stat().st_mtime > _SILENT_SECONDS
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # of another user
        return False
    return int(process) == os.getpid()  # an earlier process had the number of this one
