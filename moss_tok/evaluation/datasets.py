"""Data sets to evaluate on: JSONL files that list recordings."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from moss_tok import json_files, storage
from moss_tok.audio import files, manifest
from moss_tok.audio.manifest import TASKS

_MAX_STEM_BYTES = 255 - len("000000_.flac")  # file names have at most 255 bytes
_AUDIO_KEYS = ("audio_path", "audio_file", "audio", "wav", "path")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A list of recordings to evaluate on.

    Attributes:
      name: Name of its folder in the results.
      path: Its JSONL file.
      items: (path of the audio, name of the FLAC file in the results, domain or "").
      texts: Transcript of each recording, "" if unknown.
      seconds: Length of each recording according to its header.
    """

    name: str
    path: Path
    items: tuple[tuple[Path, str, str], ...] = dataclasses.field(repr=False)
    texts: tuple[str, ...] = dataclasses.field(repr=False)
    seconds: tuple[float, ...] = dataclasses.field(repr=False)

    def output_names(self) -> list[str]:
        """Names of the FLAC files in the results."""
        return [name for _, name, _ in self.items]


def read_dataset(path: str | Path) -> Dataset:
    """Reads a JSONL file: an object per line, with an audio path relative to the file's folder.

    Raises:
      ValueError: The file does not exist, has no lines or has a name that results.json reserves; a
        line is blank, not an object or has no path; a recording is missing, unreadable or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    manifest.refuse_recording(path)
    if path.stem.startswith("_") or path.stem == "bps":
        raise ValueError(f"{path}: the name of a data set must not begin with _ or be bps")
    if storage.printable(path.stem) != path.stem:
        raise ValueError(f"{path}: the name of a data set must be UTF-8")
    items = []
    texts = []
    lengths = []
    rows = json_files.read_json_lines(path, manifest.EXAMPLE, blank_lines=False)
    for place, fields in manifest.show_reading(rows):
        try:
            audio, seconds = _find_audio(fields, path.parent)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        output_name = f"{len(items):06d}_{_safe_stem(audio)}.flac"
        domain = storage.printable(str(fields.get("domain") or ""))
        items.append((audio, output_name, domain))
        text, task = manifest.read_text(fields)
        if task != TASKS[0]:  # only transcripts are scored
            text = ""
        texts.append(text)
        lengths.append(seconds)
    if not items:
        raise ValueError(f"{path}: no lines")
    return Dataset(
        name=path.stem,
        path=path.absolute(),
        items=tuple(items),
        texts=tuple(texts),
        seconds=tuple(lengths),
    )


def _find_audio(fields: dict[str, Any], folder: Path) -> tuple[Path, float]:
    """The path of the recording that a line names, and its length in seconds."""
    names = [fields[key] for key in _AUDIO_KEYS if fields.get(key)]
    if not names:
        raise ValueError(f"no audio path; accepted keys: {', '.join(_AUDIO_KEYS)}")
    # Not Path.expanduser, which refuses a file called ~a.wav.
    audio = folder / os.path.expanduser(str(names[0]))
    if not audio.is_file():
        raise ValueError(f"no such file: {audio}")
    seconds = files.duration_seconds(audio)
    if not seconds:
        raise ValueError(f"{audio}: empty audio")
    return audio, seconds


def _safe_stem(audio: Path) -> str:
    """The file's name without suffix, shortened, in characters that every file system accepts."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", audio.stem[:_MAX_STEM_BYTES])
    return stem.strip("._") or "audio"
