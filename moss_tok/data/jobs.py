"""Jobs that write shards and that several processes share: a plan, and complete shards.

The folder of a job holds a file with the plan, the shards, and in `parts/` a file for each finished
shard with what the summary at the end needs. A job that was interrupted writes the missing shards
when it is started again; a job with another plan is refused.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moss_tok import storage
from moss_tok.audio import files
from moss_tok.json_files import format_json, parse_json_object, read_json_object

SHARD_BYTES = "shard_bytes"  # a key of the first line of a part: the size of its shard
_PARTS = "parts"
_MIN_SHARD_HOURS = 1e-6
_MAX_AGE_SECONDS = 3600  # a process of another host has ended if its file is older than this


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard to write: its file name, and the items that go into it."""

    name: str
    items: tuple[Any, ...] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The work of a job.

    Attributes:
      folder: The folder of the shards.
      settings: Settings of the job.
      shards: All shards.
      suffix: Suffix of the names of the parts.
    """

    folder: Path
    settings: Any
    shards: tuple[Shard, ...] = dataclasses.field(repr=False)
    suffix: str

    @property
    def num_items(self) -> int:
        """Number of items in all shards."""
        return sum(len(shard.items) for shard in self.shards)

    def part_path(self, shard: Shard) -> Path:
        """The file in `parts/` of a shard."""
        return self.folder / _PARTS / f"{shard.name}{self.suffix}"

    def is_done(self, shard: Shard) -> bool:
        """Whether a shard and its part exist, and the shard has the size that its part says."""
        path = self.folder / shard.name
        part = self.part_path(shard)
        if not path.exists() or not part.exists():
            return False
        with part.open() as file:
            first_line = file.readline()
        try:
            fields = parse_json_object(first_line)
        except ValueError:  # damaged
            return False
        num_bytes = path.stat().st_size
        return fields.get(SHARD_BYTES, num_bytes) == num_bytes  # earlier versions have no size


def check_shard_hours(hours: float) -> None:
    """Raises ValueError unless the length of shards is positive, finite and not absurdly short."""
    if not _MIN_SHARD_HOURS <= hours < math.inf:
        raise ValueError(f"shard_hours must be at least {_MIN_SHARD_HOURS}, got {hours}")


def check_folder(folder: str | Path, plan_name: str) -> None:
    """Raises ValueError unless a job can use the folder: a new or empty one, or one with a plan."""
    path = storage.to_local_path(folder)
    if not str(folder) or (path.exists() and not path.is_dir()):
        raise ValueError(f"output must be a folder, got {str(folder)!r}")
    if not path.exists():
        return
    names = [file.name for file in path.iterdir()]
    # A folder with temporary files only is new: another process may be about to write the plan.
    is_new = all(name.startswith(files.INCOMPLETE) for name in names)
    if plan_name not in names and not is_new:
        raise ValueError(f"{folder}: exists and is not empty, and has no {plan_name} to resume")


def begin(folder: Path, plan_name: str, plan: dict[str, Any], other_content: str) -> None:
    """Writes the plan, or checks that the folder has the same one.

    Args:
      folder: The folder of the job.
      plan_name: Name of the file with the plan.
      plan: The plan.
      other_content: What a folder with another plan holds, for the error message.

    Raises:
      ValueError: The folder holds something else.
    """
    check_folder(folder, plan_name)
    path = folder / plan_name
    if path.exists():
        _check_plan(folder, read_json_object(path), plan, other_content)
        return
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(path, format_json(plan))


def _check_plan(
    folder: Path,
    stored: dict[str, Any],
    plan: dict[str, Any],
    other_content: str,
) -> None:
    """Raises ValueError if the stored plan differs from `plan`."""
    changes = []
    for key, value in plan.items():
        if stored.get(key) != value:
            changes.append(f"{key} was {stored.get(key)}, now {value}")
    if changes:
        raise ValueError(f"{folder} holds {other_content}: {'; '.join(changes)}")


def digest(values: Iterable[Any]) -> str:
    """A short hash of JSON values; depends on their order."""
    sha = hashlib.sha256()
    for value in values:
        line = json.dumps(value, sort_keys=True) + "\n"
        sha.update(line.encode())
    return sha.hexdigest()[:16]


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path; the file is renamed to `path` on success and removed on failure.

    Raises:
      ValueError: The file cannot be written.
    """
    name = f"{files.INCOMPLETE}{path.name}@{socket.gethostname()}@{os.getpid()}"
    temporary = path.with_name(name)
    try:
        path.parent.mkdir(exist_ok=True)
        yield temporary
        temporary.rename(path)
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError on a full disk
        raise ValueError(f"{path}: could not be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_abandoned(folder: Path) -> None:
    """Removes temporary files (see `new_file`) of processes that have ended."""
    for path in folder.rglob(f"{files.INCOMPLETE}*@*@*"):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            if _is_abandoned(path):
                path.unlink()


def _is_abandoned(path: Path) -> bool:
    _, host, process = path.name.rsplit("@", 2)
    if host != socket.gethostname():
        age_seconds = time.time() - path.stat().st_mtime
        return age_seconds > _MAX_AGE_SECONDS
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # a process of another user
        return False
    return int(process) == os.getpid()  # an earlier process had the same id as this one
