"""Writes audio and other files so that they appear only when they are complete."""

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile

from moss_tok import storage
from moss_tok.audio.decoder import BLOCK_FRAMES

_WAV_BYTES = 2**32 - 2**16  # maximum size of audio in a WAV
INCOMPLETE = ".incomplete-"  # prefix of the names of unfinished files


def write(path: str | Path, wav: np.ndarray, sample_rate: int) -> None:
    """Writes [C, S] as 16-bit PCM in the format of the suffix, clipped to [-1, 1].

    Raises:
      ValueError: The suffix is not that of an audio format, or the folder does not exist.
    """
    wav = np.asarray(wav, np.float32)
    if wav.ndim != 2:
        raise ValueError(f"{path}: audio to write must be of the shape [C, S]")
    # In blocks: libsndfile's Vorbis encoder overflows its stack on minutes at once.
    starts = range(0, wav.shape[1], BLOCK_FRAMES)
    blocks = (wav[:, start : start + BLOCK_FRAMES] for start in starts)
    write_blocks(path, blocks, sample_rate, wav.shape[0], wav.shape[1] / sample_rate)


def write_blocks(
    path: str | Path,
    blocks: Iterable[np.ndarray],
    sample_rate: int,
    num_channels: int,
    seconds: float = 0.0,
) -> None:
    """Writes blocks [num_channels, S] one by one; the file appears when it is complete.

    `seconds` is the approximate length: a file near 4 GiB must begin as RF64 instead of WAV.
    """
    path = storage.to_local_path(path)
    check_output(path)
    kind = path.suffix[1:].upper()
    if kind == "OGG" and not 1000 <= sample_rate <= 192000:
        raise ValueError(f"{path}: ogg takes sample rates of 1000..192000 Hz, got {sample_rate}")
    max_frames = _WAV_BYTES // (2 * num_channels) if kind == "WAV" else math.inf
    if seconds * sample_rate > 0.9 * max_frames:
        kind = "RF64"
        max_frames = math.inf
    options = {"format": kind, "subtype": "VORBIS" if kind == "OGG" else "PCM_16"}

    def write_to(file: object) -> None:
        target = _Target(file)
        with _named_failures(path, target):
            out = soundfile.SoundFile(target, "w", sample_rate, num_channels, **options)
        try:
            for block in blocks:  # an error of `blocks` is not a failure to write
                if not np.isfinite(block).all():
                    raise ValueError(f"{path}: audio to write must be finite")
                if out.frames + block.shape[1] > max_frames:
                    raise ValueError(f"{path}: longer than a WAV can be; choose .flac")
                with _named_failures(path, target):
                    out.write(np.clip(block, -1, 1).T)
        finally:
            with _named_failures(path, target):
                out.close()

    write_atomically(path, write_to)


class _Target:
    """A file for libsndfile that keeps its first error; raised in C, it would only be printed."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        """Writes; 0 if that fails."""
        return self._try(self._file.write, data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves the position; 0 if that fails."""
        return self._try(self._file.seek, offset, whence)

    def tell(self) -> int:
        """The position; 0 if that fails."""
        return self._try(self._file.tell)

    def _try(self, function: Callable[..., int], *args: Any) -> int:
        try:
            return function(*args)
        except BaseException as error:  # Ctrl-C, too
            self.error = self.error or error
            return 0


@contextlib.contextmanager
def _named_failures(path: Path, target: _Target) -> Iterator[None]:
    """Raises failures of libsndfile as ValueError, and those of `target` as they are."""
    try:
        yield
    except (soundfile.SoundFileError, AssertionError) as error:  # the latter after a partial write
        if target.error is None:
            raise ValueError(f"{path}: could not be written ({error})") from error
    if target.error is not None:
        raise target.error


def check_output(path: str | Path) -> None:
    """Raises ValueError unless `write` can write to `path`."""
    path = storage.to_local_path(path)
    if path.suffix.lower() not in (".wav", ".flac", ".ogg"):
        raise ValueError(f"{path}: the name must end in .wav, .flac or .ogg")
    check_parent(path)


def write_atomically(path: str | Path, write_to: Callable[[object], None]) -> None:
    """Calls `write_to` with a binary file that becomes `path` when it returns."""
    path = storage.to_local_path(path)
    check_parent(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=INCOMPLETE)
    try:
        with os.fdopen(handle, "w+b") as file:
            write_to(file)
        storage.set_mode(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_text(path: str | storage.Path, text: str) -> None:
    """Writes a text file that appears when it is complete."""
    if storage.is_remote(path):
        with storage.named_errors(path):
            storage.to_path(path).write_text(text)  # an object appears only when it is complete
    else:
        write_atomically(path, lambda file: file.write(text.encode()))


def check_parent(path: str | Path) -> None:
    """Raises ValueError unless the folder of `path` exists."""
    path = storage.to_local_path(path)
    if not path.absolute().parent.is_dir():
        raise ValueError(f"no such folder: {path.parent}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder")
