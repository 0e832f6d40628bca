"""Selects the files of a folder, and reports the others."""

import collections
from collections.abc import Iterable, Sequence

from moss_tok import storage
from moss_tok.audio import kinds, notes

_MANIFEST = ".jsonl"  # a list of the recordings, which notes do not mention
_MAX_SUFFIXES = 8  # suffixes that a note lists


def select(
    root: storage.Path,
    paths: Iterable[storage.Path],
    suffixes: Sequence[str],
    pattern: str = "",
    kind: str = "files",
) -> list[storage.Path]:
    """The files under `root` whose names end in one of `suffixes`, sorted.

    One line on standard error says which files are left out: hidden files (also those in hidden
    folders), files that need PyAV if it is not installed, and files with other suffixes.

    Args:
      root: A folder.
      paths: Files in it and in its subfolders.
      suffixes: Suffixes in lower case.
      pattern: The glob pattern that selected the files, if any.
      kind: What the error message calls the files.

    Raises:
      ValueError: No file is selected.
    """
    selected = []
    num_hidden = 0
    num_for_ffmpeg = 0
    suffix_counts: collections.Counter[str] = collections.Counter()  # of other files
    is_audio = kinds.SUFFIXES[0] in suffixes
    for path in paths:
        suffix = path.suffix.lower()
        parts = (path.name,) if pattern else path.relative_to(root).parts
        if _is_hidden(parts):
            num_hidden += 1
        elif suffix in suffixes:
            selected.append(path)
        elif is_audio and suffix in kinds.FFMPEG_SUFFIXES:
            num_for_ffmpeg += 1
        elif suffix != _MANIFEST:
            suffix_counts[suffix or "without a suffix"] += 1
    left_out = _list_left_out(num_hidden, num_for_ffmpeg, suffix_counts)
    name = pattern or str(root)
    if not selected:
        reason = f"; left out: {left_out}" if left_out else ""
        raise ValueError(f"{name}: no {kind} ({', '.join(suffixes)}){reason}")
    if left_out:
        notes.say_once(f"{name}: left out {left_out}")
    return sorted(selected)


def _is_hidden(parts: tuple[str, ...]) -> bool:
    return any(part.startswith(".") for part in parts)


def _list_left_out(
    num_hidden: int,
    num_for_ffmpeg: int,
    suffix_counts: collections.Counter[str],
) -> str:
    """Text that lists the files that are left out; "" if there are none."""
    parts = []
    if num_for_ffmpeg:
        parts.append(f"{num_for_ffmpeg} files that need PyAV ({kinds.INSTALL})")
    if num_hidden:
        parts.append(f"{num_hidden} hidden")
    num_others = suffix_counts.total()
    for suffix, count in suffix_counts.most_common(_MAX_SUFFIXES):
        parts.append(f"{count} {suffix}")
        num_others -= count
    if num_others:
        parts.append(f"{num_others} others")
    return ", ".join(parts)
