"""Arguments that several commands share."""

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Of a file that cannot be written, where the next one could not either.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def add_codec(parser: argparse.ArgumentParser) -> None:
    """--checkpoint and --num-quantizers."""
    add_checkpoint(parser)
    add_num_quantizers(parser)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """--checkpoint."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="C",
        help="checkpoint, training workdir, official directory or Hub id",
    )


def add_num_quantizers(parser: argparse.ArgumentParser) -> None:
    """--num-quantizers."""
    parser.add_argument(
        "--num-quantizers",
        type=int,
        metavar="N",
        help="use the first N quantizers; fewer means a lower bitrate (default: all)",
    )


def chunk_frames(config: Any) -> int:
    """Code frames of a long recording that are computed at once."""
    from moss_tok.codec import inference

    return max(1, round(inference.CHUNK_SECONDS * config.frame_rate))


def check_not_read(source: str, output: str) -> None:
    """Raises ValueError where a command would write over the file that it reads."""
    if Path(source).resolve() == Path(output).resolve():
        raise ValueError(f"{output}: must not be what is read")


def each_file(
    source: str, output: str, suffixes: Sequence[str], function: Callable[[Path, Path], str]
) -> int:
    """Applies `function` (from, to) to a file, or to all files of a folder.

    Args:
      source: File, or folder, which is searched recursively.
      output: Where to; a folder's files keep their places and names in it.
      suffixes: Of the files of a folder; the last is what they get.
      function: Returns what to say of a file.

    Returns:
      Exit code: 1 if files of a folder could not be read, which are listed on standard error.

    Raises:
      ValueError: As `function`, for a file alone; an empty folder, two files with one name, or no
        room for more.
      OSError: Nothing can be written there.
    """
    from moss_tok import storage
    from moss_tok.audio import folders

    *kinds, suffix = suffixes
    origin, end = Path(source).resolve(), Path(output).resolve()
    # What a folder's files become must not be read as one of them, now or the next time.
    if origin.is_file():
        check_not_read(source, output)
    elif suffix in kinds and origin in (end, *end.parents):
        raise ValueError(f"{output}: must not be what is read, nor in it")
    if not Path(source).is_dir():
        print(function(Path(source), Path(output)))
        return 0
    found = folders.select(Path(source), storage.files_under(Path(source)), kinds)
    targets = _targets(found, Path(source), Path(output), suffix)
    Path(output).mkdir(parents=True, exist_ok=True)
    storage.check_writable(Path(output))
    failures = []
    with counter(len(found), source) as count:
        for number, (target, path) in enumerate(targets.items()):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                function(path, target)
            except (ValueError, OSError) as error:
                if reason := _no_room(error):
                    _print_failures(failures)
                    done = f"{number - len(failures)} of {len(found)} files are done"
                    raise ValueError(f"{target}: {reason}; {done}") from error
                failures.append(named_error(error, path))
            count()
    print(f"{output}: {len(found) - len(failures)} of {len(found)} files")
    _print_failures(failures)
    return 1 if failures else 0


def _print_failures(failures: Sequence[str]) -> None:
    for failure in failures:
        print(f"failed: {' '.join(failure.split())}", file=sys.stderr)


def _targets(paths: Sequence[Path], source: Path, output: Path, suffix: str) -> dict[Path, Path]:
    """What the files of a folder become -> the file; ValueError where two become the same."""
    targets: dict[Path, Path] = {}
    for path in paths:
        target = output / path.relative_to(source).with_suffix(suffix)
        if target in targets:
            raise ValueError(f"{path} and {targets[target]} would both become {target}")
        targets[target] = path
    return targets


def _no_room(error: BaseException | None) -> str:
    """Why nothing can be written any more, if that is what an error comes from; else ""."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return os.strerror(error.errno)
        error = error.__cause__ or error.__context__
    return ""


def named_error(error: Exception, path: Path) -> str:
    """What an error says, with the file's name where it does not say that."""
    text = str(error)
    return text if str(path) in text else f"{path}: {text}"


def print_nowhere() -> None:
    """Throws away what is printed from now on, and what could not be written so far."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def progress(parts: Iterable[Any], total_seconds: float, part_seconds: float) -> Iterator[Any]:
    """Passes `parts` on, each worth `part_seconds` of audio, and shows how far it is."""
    with meter(total_seconds if total_seconds < 1e9 else 0.0) as add:  # streams do not say
        for part in parts:
            yield part
            add(part_seconds)


@contextlib.contextmanager
def counter(total: int, title: str) -> Iterator[Callable[[], None]]:
    """A function to call after each of `total` files: a bar on a terminal, ten lines in a log."""
    import tqdm

    terminal, done = sys.stderr.isatty(), 0
    bar = tqdm.tqdm(total=total, desc=title, unit="file", disable=not terminal, leave=False)

    def count() -> None:
        nonlocal done
        done += 1
        bar.update()
        if not terminal and total >= 10 and done * 10 // total > (done - 1) * 10 // total:
            print(f"{title}: {done} of {total} files", file=sys.stderr, flush=True)

    with bar:
        yield count


@contextlib.contextmanager
def meter(total_seconds: float) -> Iterator[Callable[[float], None]]:
    """A function to tell of seconds of audio that are done: a bar, or ten lines in a log."""
    import tqdm

    terminal, done = sys.stderr.isatty(), 0.0
    bar = tqdm.tqdm(total=round(total_seconds), unit="s", disable=not terminal, leave=False)

    def add(seconds: float) -> None:
        nonlocal done
        before, done = done, done + seconds
        bar.update(round(done) - round(before))
        tenth = total_seconds / 10
        if not terminal and tenth > 60 and int(done / tenth) > int(before / tenth):
            print(f"{done:.0f} of {total_seconds:.0f} s", file=sys.stderr, flush=True)

    with bar:
        yield add
