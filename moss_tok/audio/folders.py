"""Which files of a folder are taken, and what is said of the others."""

import collections
from collections.abc import Iterable, Sequence

from moss_tok import storage
from moss_tok.audio import kinds, notes

_MANIFEST = ".jsonl"  # a list of what is in the folder; nobody misses it among the recordings
_MOST_SUFFIXES = 8  # that a note names


def select(
    root: storage.Path,
    paths: Iterable[storage.Path],
    suffixes: Sequence[str],
    pattern: str = "",
    kind: str = "files",
) -> list[storage.Path]:
    """Those of the files under `root` that end in one of `suffixes`, sorted.

    Says once, in a line on standard error, what is left out: hidden files (also those in hidden
    folders), what needs PyAV, where that is not installed, and other suffixes.

    Args:
      root: A folder.
      paths: Files in it and in the folders in it.
      suffixes: In lower case.
      pattern: What named the files, if that was not `root`.
      kind: What the error calls them.

    Raises:
      ValueError: None is left.
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
    """What is left out, as a list; "" for nothing."""
    said = []
    if needing_ffmpeg:
        said.append(f"{needing_ffmpeg} files that need PyAV ({kinds.INSTALL})")
    if hidden:
        said.append(f"{hidden} hidden")
    common = others.most_common(_MOST_SUFFIXES)
    for suffix, count in common:
        said.append(f"{count} {suffix}")
    rest = others.total() - sum(count for _, count in common)
    if rest:
        said.append(f"{rest} others")
    return ", ".join(said)
