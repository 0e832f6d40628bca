"""Data sets as lists of audio files: a folder, or a manifest with one JSON object per line."""

import dataclasses
import json
import re
import zlib
from pathlib import Path

import soundfile

from moss_tok.audio import files

_NAME = re.compile(r"[\w .+-]{1,64}")  # domains become file names
_TEST_SHARE = 20  # one file in 20 is held out where nothing says which


@dataclasses.dataclass(frozen=True)
class AudioItem:
    """One audio file.

    Attributes:
      path: The file.
      split: "train", "test" or any other name.
      domain: "speech", "music", "sound" or any other name; "audio" where unknown.
      duration_seconds: Length.
    """

    path: Path
    split: str
    domain: str
    duration_seconds: float


def find_items(source: str | Path) -> list[AudioItem]:
    """Lists the audio of a folder (recursively) or of a manifest.jsonl.

    Manifest lines are objects with `path` (relative to the manifest), and optionally `split`,
    `domain` and `duration_s`. Where no split is given, a fixed twentieth of the files, chosen by a
    hash of their names, is "test" and the rest "train".

    Raises:
      ValueError: No such source, a broken line, or no audio in it.
    """
    source = Path(source)
    if source.is_dir():
        paths = sorted(p for p in source.rglob("*") if p.suffix.lower() in files.SUFFIXES)
        rows = [{"path": str(p.relative_to(source))} for p in paths]
        root = source
    elif source.is_file():
        rows, root = _read_rows(source), source.parent
    else:
        raise ValueError(f"{source}: no such folder or manifest")
    if not rows:
        raise ValueError(f"{source}: no audio files ({', '.join(files.SUFFIXES)})")
    held_out = _held_out([r["path"] for r in rows])
    return [_item(root, row, held_out) for row in rows]


def _read_rows(manifest: Path) -> list[dict]:
    rows = []
    try:
        lines = manifest.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{manifest}: neither a folder nor a manifest of JSON lines") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{manifest}:{number}: broken JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("path"), str):
            raise ValueError(f'{manifest}:{number}: must be an object with a "path"')
        _check_row(row, f"{manifest}:{number}")
        rows.append(row)
    return rows


def _check_row(row: dict, where: str) -> None:
    for key in ("split", "domain"):
        value = row.get(key)
        if value is not None and not (isinstance(value, str) and _NAME.fullmatch(value)):
            raise ValueError(f"{where}: {key} must be a short word, got {value!r}")
    duration = row.get("duration_s")
    is_number = isinstance(duration, (int, float)) and not isinstance(duration, bool)
    if duration is not None and not (is_number and 0 < duration < 1e6):
        raise ValueError(f"{where}: duration_s must be a positive number, got {duration!r}")


def _held_out(paths: list[str]) -> set[str]:
    """A fixed twentieth of `paths`, at least one where there are two."""
    ranked = sorted(paths, key=lambda p: zlib.crc32(p.encode()))
    return set(ranked[: max(1, len(ranked) // _TEST_SHARE)]) if len(ranked) > 1 else set()


def _item(root: Path, row: dict, held_out: set[str]) -> AudioItem:
    path = root / row["path"]
    default = "test" if row["path"] in held_out else "train"
    duration = row.get("duration_s")
    if duration is None:
        duration = _duration_seconds(path)
    return AudioItem(
        path, row.get("split") or default, row.get("domain") or "audio", float(duration)
    )


def _duration_seconds(path: Path) -> float:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return soundfile.info(path).duration
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path}: not audio ({error})") from error
