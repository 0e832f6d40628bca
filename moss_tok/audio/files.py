"""Reading and writing audio on the host: any format libsndfile knows, any rate, any channels."""

import contextlib
import dataclasses
import io
import math
import os
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

from moss_tok import storage

_BLOCK_FRAMES = 65536
_UNKNOWN = 2**62  # from here on lengths are unknown: those of streamed files
_WAV_BYTES = 2**32 - 2**16  # what a WAV's header can say, less the header
INCOMPLETE = ".incomplete-"  # what names of unfinished files begin with
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus")


@dataclasses.dataclass(frozen=True)
class AudioBytes:
    """An audio file in memory; `name` is what errors call it."""

    data: bytes = dataclasses.field(repr=False)
    name: str

    def __str__(self) -> str:
        return self.name


def read(path: str | Path | AudioBytes, sample_rate: int, num_channels: int) -> np.ndarray:
    """Reads a whole file as the model wants it: resampled, mixed down or duplicated.

    Args:
      path: wav, flac, ogg, opus or mp3.
      sample_rate: Hz to resample to.
      num_channels: To mix down to (mean) or duplicate to.

    Returns:
      [num_channels, S] float32.

    Raises:
      ValueError: No such file, not audio, empty, truncated, or with samples that are no numbers.
    """
    wav, rate = read_native(path)
    return resample(to_channels(wav, num_channels), rate, sample_rate)


def read_native(path: str | Path | AudioBytes) -> tuple[np.ndarray, int]:
    """Reads a whole file as it is: [C, S] float32 and its rate in Hz. Raises as `read`."""
    path = path if isinstance(path, AudioBytes) else storage.to_path(path)
    with _open(path) as file:
        if file.frames < _UNKNOWN:
            wav = file.read(dtype="float32", always_2d=True)
        else:
            wav = np.concatenate(list(_read_unknown(file)))
        rate, announced = file.samplerate, file.frames
    _check_complete(path, wav.shape[0], announced)
    return _checked(path, wav), rate


def _read_unknown(file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """[S, C] after [S, C] of a file that does not say how long it is; the last may be empty."""
    while True:
        wav = file.read(_BLOCK_FRAMES, np.float32, always_2d=True)
        yield wav
        if wav.shape[0] < _BLOCK_FRAMES:
            return


def read_blocks(
    path: str | Path | AudioBytes, sample_rate: int, num_channels: int, seconds: float
) -> Iterator[np.ndarray]:
    """`read` in blocks of about `seconds`, in memory that does not grow with the file.

    Yields:
      [num_channels, S] float32; joined they are what `read` returns, bit for bit.

    Raises:
      ValueError: As `read`, but damage is found when it is reached.
    """
    path = path if isinstance(path, AudioBytes) else storage.to_path(path)
    num_read, num_given, last = 0, 0, False
    with _open(path) as file:
        rate, announced, size = file.samplerate, file.frames, max(1, int(seconds * file.samplerate))
        stream = first = None
        if rate != sample_rate:
            stream = soxr.ResampleStream(rate, sample_rate, num_channels, "float32", "HQ")
        while not last:
            wav = file.read(size, np.float32, always_2d=True)
            last = wav.shape[0] < size
            if wav.size or not num_read:
                _checked(path, wav)
            block = to_channels(wav.T, num_channels)
            first = block[:, :1] if first is None else first
            if stream:
                block = stream.resample_chunk(np.ascontiguousarray(block.T), last=last).T
            num_read, num_given = num_read + wav.shape[0], num_given + block.shape[1]
            if last and num_given == 0:  # as in `resample`
                block = first
            if block.shape[1]:
                yield np.ascontiguousarray(block)
    _check_complete(path, num_read, announced)


def rechunk(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Cuts blocks [C, S] anew: all have `size` samples, but the last, which has fewer."""
    left: list[np.ndarray] = []
    for block in blocks:
        left.append(block)
        if sum(x.shape[1] for x in left) >= size:
            whole = np.concatenate(left, axis=1)
            end = whole.shape[1] // size * size
            yield from (whole[:, i : i + size] for i in range(0, end, size))
            left = [whole[:, end:]]
    rest = np.concatenate(left, axis=1)
    if rest.shape[1]:
        yield rest


def _check_complete(path: storage.Path | AudioBytes, num_read: int, announced: int) -> None:
    """Raises ValueError if fewer frames were read than the header says."""
    missing = 0 if isinstance(path, AudioBytes) else _missing_wav_bytes(path)
    if missing or num_read < announced < _UNKNOWN:
        detail = f"{missing} bytes" if missing else f"{announced - num_read} frames"
        raise ValueError(f"{path}: truncated, {detail} missing")


def read_segment(
    source: str | Path | AudioBytes, start_seconds: float, seconds: float, sample_rate: int
) -> np.ndarray:
    """Reads a part of a file, at most `seconds` long, decoding no more than that.

    Returns:
      [C, S] float32 at `sample_rate`, S at most seconds * sample_rate, shorter at the file's end.

    Raises:
      ValueError: No such file, not audio, nothing there (as where a file was cut since its length
        was noted), or samples that are no numbers.
    """
    with _open(source) as file:
        rate, start = file.samplerate, int(start_seconds * file.samplerate)
        if 0 < file.frames <= start:
            raise ValueError(f"ends after {file.frames / rate:g} s")
        file.seek(start)
        wav = file.read(int(np.ceil(seconds * rate)), np.float32, always_2d=True)
    wav = resample(_checked(source, wav), rate, sample_rate)
    return wav[:, : int(np.ceil(seconds * sample_rate))]


def duration_seconds(source: str | Path | AudioBytes) -> float:
    """Length of a file by its header, or, if that does not say, by reading it.

    Raises:
      ValueError: It is no audio.
    """
    if not isinstance(source, AudioBytes) and storage.is_remote(source):
        return _remote_duration_seconds(storage.to_path(source))
    with _open(source) as file:
        return _seconds(file)


def _remote_duration_seconds(path: storage.Path) -> float:
    with storage.named_errors(path), path.open("rb") as opened, _File(opened) as file:
        return _seconds(file)


def _seconds(file: soundfile.SoundFile) -> float:
    known = file.frames < _UNKNOWN
    frames = file.frames if known else sum(wav.shape[0] for wav in _read_unknown(file))
    return frames / file.samplerate


def subtype(source: str | Path | AudioBytes) -> str:
    """How samples are stored, in libsndfile's words: "PCM_24". Raises as `read`."""
    with _open(source) as file:
        return file.subtype


def level_db(wav: np.ndarray) -> float:
    """RMS level of audio in dB re full scale, -200 for digital silence."""
    return float(10 * np.log10(np.mean(np.square(wav, dtype=np.float64)) + 1e-20))


def _checked(source: object, wav: np.ndarray) -> np.ndarray:
    """[S, C] as read to [C, S]; ValueError where there is nothing, or no numbers."""
    if wav.size == 0:
        raise ValueError(f"{source}: empty audio")
    if not np.isfinite(wav).all():
        raise ValueError(f"{source}: has samples that are not finite numbers")
    return np.ascontiguousarray(wav.T)


@contextlib.contextmanager
def _open(source: str | Path | AudioBytes) -> Iterator[soundfile.SoundFile]:
    """Opens audio; whatever goes wrong until it is closed is a ValueError that names it."""
    if not isinstance(source, AudioBytes):
        target = source = storage.to_path(source)
        try:
            with storage.named_errors(source):
                if not source.is_file():
                    raise ValueError(f"{source}: no such file")
                if storage.is_remote(source):  # libsndfile takes a failed download for the end
                    source = AudioBytes(source.read_bytes(), str(source))
                else:
                    with source.open("rb") as file:
                        head, suffix = file.read(4), source.suffix
        except OSError as error:  # a file system of the network, say
            raise ValueError(f"{source}: cannot be read ({error.strerror})") from error
    if isinstance(source, AudioBytes):
        head, suffix, target = source.data[:4], Path(source.name).suffix, io.BytesIO(source.data)
    known = head in _MAGIC
    mp3 = head[:3] == b"ID3" or suffix.lower() == ".mp3"
    try:
        with (_File if known or not head else _QuietFile)(target) as file:
            yield file
    except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
        reason = "truncated or corrupt" if known or mp3 else "not audio"
        raise ValueError(f"{source}: {reason} ({error})") from error


_MAGIC = (b"RIFF", b"RIFX", b"fLaC", b"OggS", b"RF64")


class _QuietDecoder:
    """Keeps what the MP3 decoder prints on damaged files, from C, off standard error.

    Threads may be inside together: the first one in redirects, the last one out restores.
    """

    def __init__(self):
        self._lock, self._inside, self._saved = threading.Lock(), 0, -1

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
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
    """Does not look for the end of what does not say where it is: libsndfile takes it for an error.

    Such a file is read in blocks of a given size.
    """

    def seekable(self) -> bool:
        """As of the parent."""
        return self.frames < _UNKNOWN and super().seekable()


class _QuietFile(_File):
    """Is quiet while it opens, reads or seeks; between, standard error is the caller's."""

    def __init__(self, *args: object, **options: object):
        with _QUIET_DECODER:
            super().__init__(*args, **options)

    def read(self, *args: object, **options: object) -> np.ndarray:
        """As of the parent."""
        with _QUIET_DECODER:
            return super().read(*args, **options)

    def seek(self, *args: object, **options: object) -> int:
        """As of the parent."""
        with _QUIET_DECODER:
            return super().seek(*args, **options)


def _missing_wav_bytes(path: storage.Path) -> int:
    """How much of the data chunk a WAV's header promises is not there; libsndfile does not say."""
    with storage.named_errors(path), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        order = {b"RIFF": "<", b"RIFX": ">"}.get(file.read(12)[:4])
        while order and len(head := file.read(8)) == 8:
            name, length = struct.unpack(f"{order}4sI", head)
            if name == b"data":
                # What ffmpeg and sox write into a pipe, where they cannot know.
                streamed = length >= 0xFFFFFF00 or 0x7FFFF000 <= length <= 0x80000000
                return 0 if streamed else max(0, file.tell() + length - size)
            file.seek(length + length % 2, os.SEEK_CUR)
    return 0


def to_channels(wav: np.ndarray, num_channels: int) -> np.ndarray:
    """[C, S] to [num_channels, S]: as it is, the mean, or that duplicated."""
    if wav.shape[0] == num_channels:
        return wav
    return np.repeat(wav.mean(0, keepdims=True), num_channels, axis=0)


def resample(wav: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """[C, S] float32 from one rate to another (Hz), with soxr at high quality."""
    if rate_in == rate_out:
        return wav
    out = soxr.resample(wav.T, rate_in, rate_out, quality="HQ").T
    if out.shape[1] == 0:  # a few samples at a high rate are still a sound
        out = wav[:, :1]
    return np.ascontiguousarray(out, dtype=np.float32)


def to_pcm16(wav: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] as 16 bit little-endian integers, clipped; over 32768 they are back."""
    return np.clip(np.round(wav * 32768), -32768, 32767).astype("<i2")


def write(path: str | Path, wav: np.ndarray, sample_rate: int) -> None:
    """Writes [C, S] as 16 bit PCM in the format of the suffix, clipped to [-1, 1].

    Raises:
      ValueError: A suffix that names no audio format, or no such folder.
    """
    wav = np.asarray(wav, np.float32)
    if wav.ndim != 2:
        raise ValueError(f"{path}: audio to write must be of the shape [C, S]")
    # In blocks: libsndfile's Vorbis encoder overflows its stack on minutes at once.
    starts = range(0, wav.shape[1], _BLOCK_FRAMES)
    blocks = (wav[:, start : start + _BLOCK_FRAMES] for start in starts)
    write_blocks(path, blocks, sample_rate, wav.shape[0], wav.shape[1] / sample_rate)


def write_blocks(
    path: str | Path,
    blocks: Iterable[np.ndarray],
    sample_rate: int,
    num_channels: int,
    seconds: float = 0.0,
) -> None:
    """`write` of blocks [num_channels, S] as they come; the file appears when all are there.

    `seconds` is about how long it will be: what comes near 4 GiB must begin as RF64, not as WAV.
    """
    path = storage.to_local_path(path)
    check_output(path)
    kind = path.suffix[1:].upper()
    if kind == "OGG" and not 1000 <= sample_rate <= 192000:
        raise ValueError(f"{path}: ogg takes sample rates of 1000..192000 Hz, got {sample_rate}")
    most = _WAV_BYTES // (2 * num_channels) if kind == "WAV" else math.inf
    if seconds * sample_rate > 0.9 * most:
        kind, most = "RF64", math.inf
    options = {"format": kind, "subtype": "VORBIS" if kind == "OGG" else "PCM_16"}

    def write_to(file: object) -> None:
        with _named_failures(path):
            out = soundfile.SoundFile(file, "w", sample_rate, num_channels, **options)
        try:
            for block in blocks:  # what goes wrong in here is no failure to write
                if not np.isfinite(block).all():
                    raise ValueError(f"{path}: audio to write must be finite")
                if out.frames + block.shape[1] > most:
                    raise ValueError(f"{path}: longer than a WAV can be; choose .flac")
                with _named_failures(path):
                    out.write(np.clip(block, -1, 1).T)
        finally:
            with _named_failures(path):
                out.close()

    write_atomically(path, write_to)


@contextlib.contextmanager
def _named_failures(path: Path) -> Iterator[None]:
    """Turns libsndfile's errors into ValueError that names the file."""
    try:
        yield
    except (soundfile.SoundFileError, AssertionError) as error:  # the latter where disks are full
        raise ValueError(f"{path}: could not be written ({error})") from error


def check_output(path: str | Path) -> None:
    """Raises ValueError unless `write` could write `path`."""
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
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: str | storage.Path, text: str) -> None:
    """Writes a text file that appears when it is complete."""
    if storage.is_remote(path):
        with storage.named_errors(path):
            storage.to_path(path).write_text(text)  # objects appear whole
    else:
        write_atomically(path, lambda file: file.write(text.encode()))


def check_parent(path: str | Path) -> None:
    """Raises ValueError unless the folder that `path` would be written to exists."""
    path = storage.to_local_path(path)
    if not path.absolute().parent.is_dir():
        raise ValueError(f"no such folder: {path.parent}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder")
