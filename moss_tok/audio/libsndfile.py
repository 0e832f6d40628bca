"""Decodes with libsndfile; after a seek, it decodes enough preroll for exact samples."""

import contextlib
import os
import threading
from typing import BinaryIO

import numpy as np
import soundfile

from moss_tok.audio import decoder as decoders

_UNKNOWN = 2**62  # lengths from here on mean unknown, as in streamed files


class UnsupportedError(ValueError):
    """Libsndfile does not open a file."""


class _QuietDecoder:
    """Silences what the MP3 decoder prints from C about damaged files.

    Several threads may be inside: the first redirects standard error, the last restores it.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._inside = 0
        self._saved = -1

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._saved = os.dup(2)
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 2)
                os.close(null)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                os.dup2(self._saved, 2)
                os.close(self._saved)


_QUIET_DECODER = _QuietDecoder()


class _File(soundfile.SoundFile):
    """A file that soundfile only reads forward.

    After each read it would seek to the current position; a lossy decoder then loses its state, and
    the next samples are wrong.
    """

    def seekable(self) -> bool:
        """Tells soundfile that the file cannot seek."""
        return False

    @property
    def can_seek(self) -> bool:
        """Whether libsndfile can seek."""
        return super().seekable()


class LibsndfileDecoder:
    """A `decoder.Decoder` for files that libsndfile can open."""

    def __init__(
        self,
        name: str,
        file: BinaryIO,
        *,
        num_frames: int | None = None,
        preroll_seconds: float = 0.0,
        last_page_seconds: float = 0.0,
        seek_first: bool = False,
        quiet: bool = False,
    ):
        """Opens a file; `close` leaves `file` open.

        Args:
          name: Name of the file, for messages.
          file: A file of the system, or any seekable file object.
          num_frames: The length, if it is known better than from the header.
          preroll_seconds: Audio to decode before the target of a seek.
          last_page_seconds: Length of the last page of an Ogg. Libsndfile must not seek into it: it
            takes the end of the page for the end of its last block, and is some samples off.
          seek_first: Whether to seek to the beginning. Otherwise libsndfile begins at a wrong
            sample in Opus that was cut at its start. In short files, a later seek there is off.
          quiet: Whether to silence what the library prints.

        Raises:
          UnsupportedError: Libsndfile does not open it.
        """
        self._name = name
        self._quiet = _QUIET_DECODER if quiet else contextlib.nullcontext()
        try:
            with self._quiet:
                self._file = _File(_target(file), closefd=False)
        except (soundfile.LibsndfileError, TypeError) as error:
            reason = getattr(error, "error_string", str(error))
            raise UnsupportedError(reason) from error
        self.sample_rate = self._file.samplerate
        self.num_channels = self._file.channels
        self.subtype = self._file.subtype
        self.num_frames = num_frames
        if num_frames is None and self._file.frames < _UNKNOWN:
            self.num_frames = self._file.frames
        self._preroll = int(preroll_seconds * self.sample_rate)
        self._last_page = int(np.ceil(last_page_seconds * self.sample_rate))
        self._position = 0
        if seek_first:
            self._go_to(0)

    def read(self, frames: int) -> np.ndarray:
        """See `decoder.Decoder`."""
        if self.num_frames is not None:
            frames = min(frames, self.num_frames - self._position)
        if frames <= 0:
            return np.zeros((0, self.num_channels), np.float32)
        try:
            with self._quiet:
                wav = self._file.read(frames, np.float32, always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            reason = getattr(error, "error_string", str(error))
            raise ValueError(f"{self._name}: truncated or corrupt ({reason})") from error
        self._position += wav.shape[0]
        if wav.shape[0] < frames and self.num_frames is not None:
            missing = self.num_frames - self._position
            raise ValueError(f"{self._name}: truncated or corrupt, {missing} frames missing")
        return wav

    def count(self) -> int:
        """See `decoder.Decoder`."""
        if self.num_frames is not None:
            return self.num_frames
        return sum(wav.shape[0] for wav in decoders.read_blocks(self))

    def seek(self, frame: int) -> None:
        """See `decoder.Decoder`."""
        # After the seek, the decoder skips the samples between the target and `frame`.
        if self._file.can_seek and frame != self._position:
            target = frame
            if self._last_page and self.num_frames is not None:
                target = min(target, self.num_frames - self._last_page)
            target = max(0, target - self._preroll)
            if target != self._position:
                self._go_to(target)
        decoders.skip(self, frame - self._position)

    def _go_to(self, frame: int) -> None:
        try:
            with self._quiet:
                self._file.seek(frame)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            reason = getattr(error, "error_string", str(error))
            raise ValueError(f"{self._name}: truncated or corrupt ({reason})") from error
        self._position = frame

    def close(self) -> None:
        """See `decoder.Decoder`."""
        self._file.close()


def _target(file: BinaryIO) -> int | BinaryIO:
    """What soundfile opens: the descriptor of a system file, because that reads faster."""
    file.seek(0)
    try:
        descriptor = file.fileno()
    except OSError:
        return file
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
