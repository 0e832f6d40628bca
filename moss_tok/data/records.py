"""ArrayRecord shards of audio: each record is a msgpack map of an encoded file and its metadata.

The keys are `audio` (the bytes of a FLAC file, or of any other format that is read) and
`metadata` (a map with `id`, `domain`, `duration_s` and, if known, `transcript` and more).
"""

import functools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgpack
from grain.sources import ArrayRecordDataSource

from moss_tok import storage
from moss_tok.audio import files
from moss_tok.audio.files import AudioBytes

SUFFIX = ".array_record"


def pack(audio: bytes, metadata: dict[str, Any]) -> bytes:
    """One record."""
    return msgpack.packb({"audio": audio, "metadata": metadata})


def check_metadata(name: str, metadata: dict[str, Any]) -> None:
    """Raises ValueError unless a record with the id `name` can hold the metadata."""
    try:
        json.dumps(metadata)
        msgpack.packb([name, metadata])
    # Causes: a lone surrogate, an integer of more than 64 bits, a value of type bytes.
    except (ValueError, OverflowError, TypeError) as error:
        raise ValueError(f"{name!r}: its metadata cannot be stored: {error}") from error


def unpack(record: bytes, name: str) -> tuple[AudioBytes, dict[str, Any]]:
    """Audio and metadata of a record; `name` is its name in error messages.

    Raises:
      ValueError: The record is broken.
    """
    try:
        fields = msgpack.unpackb(record)
        audio = fields["audio"]
        metadata = fields["metadata"]
    except Exception as error:  # msgpack's errors share no base class
        raise ValueError(f"{name}: no record of audio and metadata ({error})") from error
    if not isinstance(audio, bytes) or not isinstance(metadata, dict):
        raise ValueError(f"{name}: no record of audio and metadata")
    return AudioBytes(audio, name), metadata


class Shards:
    """Random access to the records of several shards; picklable."""

    def __init__(self, paths: Sequence[storage.Path]):
        """Opens the shards. Shards in buckets are copied first: ArrayRecord reads files only.

        Raises:
          ValueError: A shard is missing or broken.
        """
        self.paths = list(paths)
        for path in self.paths:
            if not path.is_file():
                raise ValueError(f"{path}: no such file")
        self._source = open_shards(self.paths)

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        """The name of a record in error messages."""
        path = self.paths[0] if len(self.paths) == 1 else self.paths[0].parent
        return f"{path}[{index}]"

    def read(self, index: int) -> tuple[AudioBytes, dict[str, Any]]:
        """Audio and metadata of a record. Raises ValueError if it is broken."""
        try:
            record = self._source[index]
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(f"{self.name(index)}: broken record ({error})") from error
        return unpack(record, self.name(index))


def open_shards(paths: Sequence[storage.Path]) -> ArrayRecordDataSource:
    """Random access to the bytes of the records. Raises ValueError if a shard is broken."""
    copies = local_copies(paths)
    try:
        return ArrayRecordDataSource(list(map(str, copies)))
    except (RuntimeError, ValueError) as error:
        hints = filter(None, map(storage.pointer_hint, copies))
        reason = str(next(hints, error)) or "truncated or of another kind"
        raise ValueError(f"{paths[0]} ...: no ArrayRecord files ({reason})") from error


@functools.lru_cache(maxsize=256)
def shard(path: storage.Path) -> Shards:
    """One shard, kept open."""
    return Shards([path])


def local_copies(paths: Sequence[storage.Path]) -> list[Path]:
    """Returns local files for shards; shards in buckets are copied to a cache first.

    The cache is the folder $MOSS_TOK_CACHE, or ~/.cache/moss_tok. A file that it has already is
    used if its size is right.

    Raises:
      ValueError: The disk has no room for the copies.
    """
    default = Path.home() / ".cache" / "moss_tok"
    cache = Path(os.environ.get("MOSS_TOK_CACHE", default))
    copies = []
    missing = []
    for path in paths:
        copy = Path(path)
        if storage.is_remote(path):
            copy = cache / storage.without_prefix(path)
            size_bytes = storage.size_bytes(path)
            if not (copy.is_file() and copy.stat().st_size == size_bytes):
                missing.append((path, copy, size_bytes))
        copies.append(copy)
    if missing:
        _fetch(cache, missing)
    return copies


def _fetch(cache: Path, missing: list[tuple[storage.Path, Path, int]]) -> None:
    """Copies shards to the cache; `missing` lists (shard, copy, size in bytes)."""
    cache.mkdir(parents=True, exist_ok=True)
    needed_bytes = sum(size_bytes for _, _, size_bytes in missing)
    free_bytes = shutil.disk_usage(cache).free
    needed_gb = needed_bytes / 1e9
    if needed_bytes > 0.95 * free_bytes:
        first, _, _ = missing[0]
        raise ValueError(
            f"{first} ...: {needed_gb:.1f} GB of shards have to be copied to {cache} "
            f"($MOSS_TOK_CACHE), where {free_bytes / 1e9:.1f} GB are free; or mount them with "
            "gcsfuse"
        )
    print(f"copying {len(missing)} files, {needed_gb:.2f} GB, to {cache}", flush=True)
    for path, copy, _ in missing:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with storage.named_errors(path), path.open("rb") as source:
            copy_to = functools.partial(shutil.copyfileobj, source, length=1 << 24)
            files.write_atomically(copy, copy_to)
