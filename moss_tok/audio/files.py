"""Reads and writes audio on the host, in any format, at any rate, with any number of channels.

Libsndfile decodes the formats that it knows, and PyAV (`pip install 'moss_tok[ffmpeg]'`) the
others. A file is either read to its real end or refused with a reason.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import soxr

from moss_tok.audio import decoder as decoders
from moss_tok.audio.kinds import FFMPEG_SUFFIXES as FFMPEG_SUFFIXES
from moss_tok.audio.kinds import SUFFIXES as SUFFIXES
from moss_tok.audio.kinds import readable_suffixes as readable_suffixes
from moss_tok.audio.opening import AudioBytes as AudioBytes
from moss_tok.audio.opening import Use, open_audio
from moss_tok.audio.writing import INCOMPLETE as INCOMPLETE
from moss_tok.audio.writing import check_output as check_output
from moss_tok.audio.writing import check_parent as check_parent
from moss_tok.audio.writing import write as write
from moss_tok.audio.writing import write_atomically as write_atomically
from moss_tok.audio.writing import write_blocks as write_blocks
from moss_tok.audio.writing import write_text as write_text

Source = str | Path | AudioBytes


def read(path: Source, sample_rate: int, num_channels: int) -> np.ndarray:
    """Reads a whole file and converts it to a sample rate and a number of channels.

    Args:
      path: A file of any format in SUFFIXES, or in FFMPEG_SUFFIXES if PyAV is installed.
      sample_rate: Hz, to resample to.
      num_channels: Channels to mix down (mean) or duplicate to.

    Returns:
      [num_channels, S] float32.

    Raises:
      ValueError: The file does not exist, is not audio, not supported, empty, truncated or corrupt,
        has parts with different rates or channels, or samples that are not finite.
    """
    wav, rate = read_native(path)
    return resample(to_channels(wav, num_channels), rate, sample_rate)


def read_native(path: Source) -> tuple[np.ndarray, int]:
    """Reads a whole file without conversion: [C, S] float32 and its rate in Hz; see `read`."""
    with open_audio(path, Use.ALL) as decoder:
        samples = decoders.read_all(decoder)
        return _checked(path, samples), decoder.sample_rate


def read_blocks(
    path: Source,
    sample_rate: int,
    num_channels: int,
    seconds: float,
) -> Iterator[np.ndarray]:
    """Reads like `read`, in blocks of about `seconds`; memory does not grow with the file.

    Yields:
      [num_channels, S] float32; joined, the blocks are bit for bit the result of `read`.

    Raises:
      ValueError: See `read`. Some damage is noticed only when it is reached.
    """
    with open_audio(path, Use.ALL) as decoder:
        rate = decoder.sample_rate
        size = max(1, int(seconds * rate))
        stream = None
        if rate != sample_rate:
            stream = soxr.ResampleStream(rate, sample_rate, num_channels, "float32", "HQ")
        first_sample = None  # [num_channels, 1]
        num_yielded = 0
        is_last = False
        while not is_last:
            wav = decoder.read(size)
            is_last = wav.shape[0] < size
            if wav.size or first_sample is None:
                _checked(path, wav)
            block = to_channels(wav.T, num_channels)
            if first_sample is None:
                first_sample = block[:, :1]
            if stream:
                block = stream.resample_chunk(np.ascontiguousarray(block.T), last=is_last).T
            num_yielded += block.shape[1]
            if is_last and num_yielded == 0:  # as in `resample`
                block = first_sample
            if block.shape[1]:
                yield np.ascontiguousarray(block)


def rechunk(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Regroups blocks [C, S] into blocks of `size` samples; the last may have fewer."""
    pending: list[np.ndarray] = []
    num_pending = 0
    for block in blocks:
        pending.append(block)
        num_pending += block.shape[1]
        if num_pending < size:
            continue
        joined = np.concatenate(pending, axis=1)
        end = num_pending // size * size
        for start in range(0, end, size):
            yield joined[:, start : start + size]
        pending = [joined[:, end:]]
        num_pending -= end
    remainder = np.concatenate(pending, axis=1)
    if num_pending:
        yield remainder


def read_segment(
    source: Source,
    start_seconds: float,
    seconds: float,
    sample_rate: int,
) -> np.ndarray:
    """Reads a part of a file, at most `seconds` long, and decodes little more than that.

    At the file's own rate, the result is that part of `read_native`. At another rate, the filter of
    the resampler does not see the samples before and after the part. PyAV decodes more, see
    `ffmpeg`.

    Returns:
      [C, S] float32 at `sample_rate`, S at most seconds * sample_rate, less at the file's end.

    Raises:
      ValueError: See `read`; or the file ends before the part.
    """
    with open_audio(source, Use.PART) as decoder:
        rate = decoder.sample_rate
        start = int(start_seconds * rate)
        total = decoder.num_frames
        wav = np.zeros((0, decoder.num_channels), np.float32)
        if total is None or start < total:
            if start > 0:
                decoder.seek(start)
            wav = decoder.read(int(np.ceil(seconds * rate)))
        if start > 0 and total != 0 and not wav.size:
            end = "before that" if total is None else f"after {total / rate:g} s"
            raise ValueError(f"{source}: nothing at {start / rate:g} s, it ends {end}")
    wav = resample(_checked(source, wav), rate, sample_rate)
    return wav[:, : int(np.ceil(seconds * sample_rate))]


def duration_seconds(source: Source) -> float:
    """Length of the audio that `read` returns: from the header if that is exact, else by reading.

    Raises:
      ValueError: See `read`; damage in the middle of the file is not noticed.
    """
    with open_audio(source, Use.LENGTH) as decoder:
        return decoder.count() / decoder.sample_rate


def subtype(source: Source) -> str:
    """The format of the stored samples, by libsndfile's name: "PCM_24".

    Raises:
      ValueError: See `read`.
    """
    with open_audio(source, Use.LENGTH) as decoder:
        return decoder.subtype


def level_db(wav: np.ndarray) -> float:
    """RMS level of audio in dB re full scale, -200 for digital silence."""
    power = np.mean(np.square(wav, dtype=np.float64))
    return float(10 * np.log10(power + 1e-20))


def _checked(source: object, wav: np.ndarray) -> np.ndarray:
    """[S, C] -> [C, S]. Raises ValueError if there are no samples, or some are not finite."""
    if wav.size == 0:
        raise ValueError(f"{source}: empty audio")
    if not np.isfinite(wav).all():
        raise ValueError(f"{source}: has samples that are not finite numbers")
    return np.ascontiguousarray(wav.T)


def to_channels(wav: np.ndarray, num_channels: int) -> np.ndarray:
    """[C, S] -> [num_channels, S]: unchanged, or the mean, duplicated as needed."""
    if wav.shape[0] == num_channels:
        return wav
    return np.repeat(wav.mean(0, keepdims=True), num_channels, axis=0)


def resample(wav: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """[C, S] float32 from one rate to another (Hz), with soxr at high quality."""
    if rate_in == rate_out:
        return wav
    out = soxr.resample(wav.T, rate_in, rate_out, quality="HQ").T
    if out.shape[1] == 0:  # a few samples at a high rate become at least one
        out = wav[:, :1]
    return np.ascontiguousarray(out, dtype=np.float32)


def to_pcm16(wav: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] -> 16-bit integers (little-endian), clipped; `x / 32768` inverts it."""
    return np.clip(np.round(wav * 32768), -32768, 32767).astype("<i2")
