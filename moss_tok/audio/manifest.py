"""Lists the audio files of a data set: a folder, or a manifest with a JSON object per line."""

import dataclasses
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tqdm

from moss_tok import storage
from moss_tok.audio import files, folders, kinds
from moss_tok.errors import is_number
from moss_tok.json_files import read_json_lines, shorten

TASKS = ("transcribe", "transcribe_speakers", "caption")
DOMAINS = ("speech", "music", "sound", "other")
EXAMPLE = '{"path": "a.wav"}'  # a line of a manifest, for error messages

T = TypeVar("T")

_HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON can express it, UTF-8 cannot
_NAME = re.compile(r"[\w .+-]{1,64}")  # domains become file names
_TEST_SHARE = 20  # without splits in the manifest, one file in 20 is held out


@dataclasses.dataclass(frozen=True)
class AudioItem:
    """One recording.

    Attributes:
      path: An audio file, or an ArrayRecord shard.
      split: "train", "test" or any other name.
      domain: "speech", "music", "sound" or any other name; "audio" if unknown.
      duration_seconds: Length.
      record: Its number in the shard; None for an audio file.
      metadata: Other fields of its manifest line (`transcript`, `speaker`, ...).
    """

    path: storage.Path
    split: str
    domain: str
    duration_seconds: float
    record: int | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)


def find_items(source: str | storage.Path) -> list[AudioItem]:
    """Lists the audio of a folder (recursively) or of a manifest.jsonl.

    Manifest lines are objects with `path` (relative to the manifest), and optionally `split`,
    `domain`, `duration_s`, `transcript`, `caption`, `task` (see `read_text`), and `record` for a
    record of a shard. If no split is given, a fixed twentieth of the files, chosen by a hash of
    their names, is "test"; all others are "train".

    Raises:
      ValueError: The source does not exist, has a broken line, or has no audio.
    """
    source = storage.to_path(source)
    if source.is_dir():
        return list_files(source, storage.files_under(source))
    if not source.is_file():
        raise ValueError(f"{source}: no such folder or manifest")
    refuse_recording(source)
    rows = _read_rows(source)
    if not rows:
        raise ValueError(f"{source}: no lines")
    return _items(source.parent, rows)


def refuse_recording(path: storage.Path) -> None:
    """Raises ValueError if a file that should be a manifest has the name of a recording."""
    if path.suffix.lower() in (*kinds.SUFFIXES, *kinds.FFMPEG_SUFFIXES):
        raise ValueError(f"{path}: is a recording; must be a manifest, with a JSON object per line")


def list_files(
    root: storage.Path,
    paths: Sequence[storage.Path],
    pattern: str = "",
) -> list[AudioItem]:
    """The audio files among `paths` under `root`; a note lists the others, see `folders.select`.

    `pattern` is the glob pattern that selected the paths, if any.

    Raises:
      ValueError: There are no audio files.
    """
    rows = []
    for path in folders.select(root, paths, files.readable_suffixes(), pattern, "audio files"):
        rows.append({"path": str(path.relative_to(root))})
    return _items(root, rows)


def _read_rows(manifest: storage.Path) -> list[dict]:
    rows = []
    for place, row in read_json_lines(manifest, EXAMPLE):
        if not isinstance(row.get("path"), str):
            raise ValueError(f'{place}: must have a "path", got {shorten(json.dumps(row))}')
        _check_row(row, place)
        rows.append(row)
    return rows


def _check_row(row: dict, place: str) -> None:
    try:
        storage.name_bytes(row["path"])
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: path must be a file's name, got {row['path']!r}") from error
    for key in ("split", "domain"):
        value = row.get(key)
        if value is not None and not (isinstance(value, str) and _NAME.fullmatch(value)):
            raise ValueError(f"{place}: {key} must be a short word, got {value!r}")
    for key in ("transcript", "caption"):
        if not isinstance(row.get(key), str | None):
            raise ValueError(f"{place}: {key} must be a text, got {row[key]!r}")
        if _HALF_PAIR.search(row.get(key) or ""):
            raise ValueError(f"{place}: {key} has half a surrogate pair")
    if row.get("task") not in (None, *TASKS):
        raise ValueError(f"{place}: task must be one of {', '.join(TASKS)}, got {row['task']!r}")
    duration = row.get("duration_s")
    record = row.get("record")
    if duration is not None and not (is_number(duration) and 0 < duration < 1e6):
        raise ValueError(f"{place}: duration_s must be a positive number, got {duration!r}")
    if record is not None:
        if isinstance(record, bool) or not isinstance(record, int) or record < 0:
            raise ValueError(f"{place}: record must be an integer of at least 0, got {record!r}")
        if duration is None:
            raise ValueError(f"{place}: a record needs duration_s")


def read_text(metadata: dict[str, Any]) -> tuple[str, str]:
    """The text of a recording ("" if it has none), and its task, one of TASKS.

    Without a `task`, the text is the `transcript`, or else the `caption`.
    """
    task = metadata.get("task")
    if task not in TASKS:
        has_caption_only = metadata.get("caption") and not metadata.get("transcript")
        task = "caption" if has_caption_only else TASKS[0]
    key = "caption" if task == "caption" else "transcript"
    text = metadata.get(key)
    if not isinstance(text, str):
        return "", task
    return text.strip(), task


def domain_index(domain: str) -> int:
    """Index in DOMAINS of a domain; other names count as "other"."""
    if domain not in DOMAINS:
        domain = "other"
    return DOMAINS.index(domain)


def _held_out(paths: set[str]) -> set[str]:
    """A fixed twentieth of `paths`, at least one if there are two or more."""
    if len(paths) < 2:
        return set()
    ranked = sorted(sorted(paths), key=_hash_name)
    num_held_out = max(1, len(ranked) // _TEST_SHARE)
    return set(ranked[:num_held_out])


def _hash_name(path: str) -> int:
    return zlib.crc32(storage.name_bytes(path))


def _items(root: storage.Path, rows: list[dict]) -> list[AudioItem]:
    held_out = _held_out({row["path"] for row in rows if not row.get("split")})
    return [_item(root, row, held_out) for row in show_reading(rows)]


def show_reading(rows: Sequence[T]) -> Iterator[T]:
    """Yields `rows`, each of which stands for a file, and shows progress if it takes over 2 s.

    It shows a bar on a terminal, and prints a line every ten seconds otherwise.
    """
    every = 0.1 if sys.stderr.isatty() else 10
    options = {"unit": "file", "leave": False, "delay": 2, "mininterval": every}
    yield from tqdm.tqdm(rows, "reading lengths", **options)


def _item(root: storage.Path, row: dict, held_out: set[str]) -> AudioItem:
    metadata = dict(row)
    name = metadata.pop("path")
    path = storage.join(root, name)
    default_split = "test" if name in held_out else "train"
    split = metadata.pop("split", None) or default_split
    domain = metadata.pop("domain", None) or "audio"
    duration = metadata.pop("duration_s", None)
    record = metadata.pop("record", None)
    return AudioItem(path, split, domain, _seconds(path, duration), record, metadata)


def _seconds(path: storage.Path, duration: float | None) -> float:
    """The length from the manifest, else from the file; 0 if it cannot be read."""
    if duration is not None:
        return float(duration)
    try:
        return files.duration_seconds(path)
    except (ValueError, OSError):
        return 0.0
