"""Selects the files of a folder, and reports the others."""

import collections
from collections.abc import Iterable, Sequence

from moss_tok import storage
from moss_tok.audio import kinds, notes

_MANIFEST = ".jsonl"  # a list of the recordings; need not be reported as left out
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
      ValueError: No file is left.
    """
    chosen = []
    hidden = 0
    needing_ffmpeg = 0
    others: collections.Counter[str] = collections.Counter()
    wants_audio = kinds.SUFFIXES[0] in suffixes
    for path in paths:
        suffix = path.suffix.lower()
        if _is_hidden((path.name,) if pattern else path.relative_to(root).parts):
            hidden += 1
        elif suffix in suffixes:
            chosen.append(path)
        elif wants_audio and suffix in kinds.FFMPEG_SUFFIXES:
            needing_ffmpeg += 1
        elif suffix != _MANIFEST:
            others[suffix or "without a suffix"] += 1
    said = _left_out(hidden, needing_ffmpeg, others)
    name = pattern or str(root)
    if not chosen:
        reason = f"; left out: {said}" if said else ""
        raise ValueError(f"{name}: no {kind} ({', '.join(suffixes)}){reason}")
    if said:
        notes.say_once(f"{name}: left out {said}")
    return sorted(chosen)


def _is_hidden(parts: tuple[str, ...]) -> bool:
    for part in parts:
        if part.startswith("."):
            return True
    return False


def _left_out(hidden: int, needing_ffmpeg: int, others: collections.Counter[str]) -> str:
    """Text that lists what is left out; "" for nothing."""
    said = []
    if needing_ffmpeg:
        said.append(f"{needing_ffmpeg} files that need PyAV ({kinds.INSTALL})")
    if hidden:
        said.append(f"{hidden} hidden")
    common = others.most_common(_MAX_SUFFIXES)
    for suffix, count in common:
        said.append(f"{count} {suffix}")
    rest = others.total() - sum(count for _, count in common)
    if rest:
        said.append(f"{rest} others")
    return ", ".join(said)
