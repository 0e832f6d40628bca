"""Arguments, file loops and progress bars that several commands share."""

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Errors of one file after which no other file could be written either.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_DECODED = ".wav"  # suffix of decoded audio


def add_codec(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Adds --checkpoint and --num-quantizers."""
    add_checkpoint(parser, required)
    add_num_quantizers(parser)


def add_checkpoint(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Adds --checkpoint; unless it is required, the default is the codec in the package."""
    default = "" if required else " (default: the small codec that comes with moss_tok)"
    parser.add_argument(
        "--checkpoint",
        required=required,
        metavar="C",
        help=f"checkpoint, training workdir, official directory or Hugging Face Hub id{default}",
    )


def add_num_quantizers(parser: argparse.ArgumentParser) -> None:
    """Adds --num-quantizers."""
    parser.add_argument(
        "--num-quantizers",
        type=int,
        metavar="N",
        help="use the first N quantizers; fewer means a lower bitrate (default: all)",
    )


def add_audio_input(parser: argparse.ArgumentParser) -> None:
    """Adds the audio to read: a file or a folder."""
    parser.add_argument(
        "input",
        metavar="IN",
        help="audio file of any format, sample rate and number of channels, or a folder of them",
    )


def add_audio_output(parser: argparse.ArgumentParser) -> None:
    """Adds the audio to write: a file or a folder."""
    parser.add_argument(
        "output", metavar="OUT.wav", help="wav, flac or ogg file; for a folder: a folder of wav"
    )


def check_audio_output(source: str, output: str) -> None:
    """Raises ValueError if the input does not exist, or the output cannot be an audio file."""
    from moss_tok import storage
    from moss_tok.audio import files

    path = storage.to_local_path(source)
    if not path.exists():
        raise ValueError(f"{source}: no such file")
    if not path.is_dir():
        files.check_output(output)


def check_not_overwritten(source: str, output: str) -> None:
    """Raises ValueError if the output file is the input file."""
    if Path(source).resolve() == Path(output).resolve():
        raise ValueError(f"{output}: the output must not be the input")


def each_file(
    source: str, output: str, suffixes: Sequence[str], function: Callable[[Path, Path], str]
) -> int:
    """Applies `function` (input path, output path) to a file, or to all files of a folder.

    Args:
      source: File, or folder, which is searched recursively.
      output: Output file, or folder, in which the files keep their relative paths.
      suffixes: Suffixes of the input files of a folder, then the suffix of the output files.
      function: Processes a file and returns a line to print about it.

    Returns:
      Exit code: 1 if some files of a folder failed; they are listed on standard error.

    Raises:
      ValueError: From `function`, for a single file; an empty folder, two files with one output
        path, or a full or read-only disk.
      OSError: The output folder cannot be written.
    """
    from moss_tok import storage

    *input_suffixes, output_suffix = suffixes
    storage.to_local_path(output)
    if not Path(source).is_dir():
        if Path(source).is_file():
            check_not_overwritten(source, output)
        print(function(Path(source), Path(output)))
        return 0
    # Otherwise outputs would be read as inputs, in this run or the next.
    if output_suffix in input_suffixes:
        _check_outside(source, output)
    return _each_of_folder(Path(source), Path(output), suffixes, function)


def _check_outside(source: str, output: str) -> None:
    if _is_inside(source, output):
        raise ValueError(f"{output}: the output must not be the input folder or inside it")


def _is_inside(source: str | Path, output: str | Path) -> bool:
    """Whether the output folder is the input folder or inside it."""
    folder = Path(source).resolve()
    target = Path(output).resolve()
    return folder == target or folder in target.parents


def _each_of_folder(
    source: Path, output: Path, suffixes: Sequence[str], function: Callable[[Path, Path], str]
) -> int:
    from moss_tok import storage
    from moss_tok.audio import folders

    *input_suffixes, output_suffix = suffixes
    paths = folders.select(source, storage.files_under(source), input_suffixes)
    sources = _match_outputs(paths, source, output, output_suffix)
    if output_suffix == _DECODED:
        _check_no_recordings(source, output, sources)
    output.mkdir(parents=True, exist_ok=True)
    storage.check_writable(output)
    failures: list[str] = []
    with counter(len(paths), str(source)) as count:
        for number, (target, path) in enumerate(sources.items()):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                function(path, target)
            except (ValueError, OSError) as error:
                if reason := _no_room(error):
                    print_failures(failures)
                    done = f"{number - len(failures)} of {len(paths)} files are done"
                    raise ValueError(f"{target}: {reason}; {done}") from error
                failures.append(named_error(error, path))
            count()
    print(f"{output}: {len(paths) - len(failures)} of {len(paths)} files")
    print_failures(failures)
    return 1 if failures else 0


def _match_outputs(
    paths: Sequence[Path], source: Path, output: Path, suffix: str
) -> Mapping[Path, Path]:
    """Maps output paths to input paths; ValueError if two inputs have the same output."""
    sources: dict[Path, Path] = {}
    for path in paths:
        target = output / path.relative_to(source).with_suffix(suffix)
        if target in sources:
            raise ValueError(f"{path} and {sources[target]} would both become {target}")
        sources[target] = path
    return sources


def _check_no_recordings(source: Path, output: Path, targets: Iterable[Path]) -> None:
    """Raises ValueError if decoding into the folder of the codes would replace a file.

    It may be the recording that was encoded.
    """
    if not _is_inside(source, output):
        return
    for target in targets:
        if target.exists():
            raise ValueError(f"{target}: exists, maybe the original; decode into another folder")


def _no_room(error: BaseException | None) -> str:
    """The reason if a full or read-only disk caused an error; otherwise an empty string."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return os.strerror(error.errno)
        error = error.__cause__ or error.__context__
    return ""


def print_failures(failures: Sequence[str]) -> None:
    """Prints a line per failed file on standard error."""
    for failure in failures:
        print(f"failed: {' '.join(failure.split())}", file=sys.stderr)


def named_error(error: Exception, path: Path) -> str:
    """The text of an error, with the file's name in front unless the text contains it."""
    text = str(error)
    return text if str(path) in text else f"{path}: {text}"


def check_standard_output() -> None:
    """Raises ValueError if standard output is closed, as after `>&-`."""
    if sys.stdout is None:
        raise ValueError("standard output is closed")


def discard_output() -> None:
    """Discards all further standard output, buffered text included."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def progress(parts: Iterable[Any], total_seconds: float, part_seconds: float) -> Iterator[Any]:
    """Yields `parts`, each `part_seconds` of audio, and shows the progress."""
    if total_seconds > 1e9:  # streams have no length in their header
        total_seconds = 0.0
    with meter(total_seconds) as add:
        for part in parts:
            yield part
            add(part_seconds)


@contextlib.contextmanager
def counter(total: int, title: str) -> Iterator[Callable[[], None]]:
    """Gives a function to call after each of `total` files.

    It shows a progress bar on a terminal, and prints ten lines otherwise.
    """
    import tqdm

    terminal = sys.stderr.isatty()
    done = 0
    bar = tqdm.tqdm(total=total, desc=title, unit="file", disable=not terminal, leave=False)

    def count() -> None:
        nonlocal done
        done += 1
        bar.update()
        new_tenth = done * 10 // total > (done - 1) * 10 // total
        if not terminal and total >= 10 and new_tenth:
            print(f"{title}: {done} of {total} files", file=sys.stderr, flush=True)

    with bar:
        yield count


@contextlib.contextmanager
def meter(total_seconds: float) -> Iterator[Callable[[float], None]]:
    """Gives a function to call with the seconds of audio that each step has processed.

    It shows a progress bar on a terminal, and prints ten lines otherwise.
    """
    import tqdm

    terminal = sys.stderr.isatty()
    done = 0.0
    bar = tqdm.tqdm(total=round(total_seconds), unit="s", disable=not terminal, leave=False)

    def add(seconds: float) -> None:
        nonlocal done
        before = done
        done += seconds
        bar.update(round(done) - round(before))
        tenth = total_seconds / 10
        # Below 10 minutes no lines are worth printing; this also guards the division by zero.
        if not terminal and tenth > 60 and int(done / tenth) > int(before / tenth):
            print(f"{done:.0f} of {total_seconds:.0f} s", file=sys.stderr, flush=True)

    with bar:
        yield add


def codec_of_run(checkpoint: str, flag: str) -> str:
    """The codec in the settings of a training workdir of a speech model.

    Raises:
      ValueError: They do not say which; the message names the `flag` that does.
    """
    from moss_tok import storage
    from moss_tok.checkpoint import RUN_CONFIG_NAME
    from moss_tok.json_files import read_json_object

    path = storage.to_path(checkpoint) / RUN_CONFIG_NAME
    codec = read_json_object(path).get("codec") if path.is_file() else None
    if not codec:
        raise ValueError(f"{checkpoint} does not say which codec it speaks with: give {flag}")
    return codec
