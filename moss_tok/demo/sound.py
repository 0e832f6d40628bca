"""Recordings of the demo: reading what a browser sends, coding it, and pictures of the results."""

import dataclasses
import functools
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import soundfile

from moss_tok.audio import files
from moss_tok.codec.inference import Codec, decode_one, encode_one
from moss_tok.evaluation import metrics
from moss_tok.speech.speaking import Block

MAX_SECONDS = 60.0  # of a recording; the rest is not used
_SILENCE_DB = -80.0  # RMS re full scale
_COLUMNS = 1200  # of a spectrogram, at most
_BANDS = 128
_RANGE_DB = 75.0  # below the loudest band of the original
_TICKS = (250, 500, 1000, 2000, 4000, 8000, 16000)  # Hz


@dataclasses.dataclass(frozen=True)
class Recording:
    """An uploaded recording and its codes.

    Attributes:
      wav: [C, S] float32 at the codec's sample rate.
      codes: [Q, T].
      seconds: Length of the file, of which at most MAX_SECONDS are in `wav`.
    """

    wav: np.ndarray
    codes: np.ndarray
    seconds: float


def read(codec: Codec, data: bytes, name: str) -> Recording:
    """Reads and encodes an uploaded file.

    Raises:
      ValueError: It is empty, no audio, broken or silent.
    """
    if not data:
        raise ValueError(f"{name}: the file is empty")
    source = files.AudioBytes(data, name)
    config = codec.config
    seconds = files.duration_seconds(source)
    wav = files.read_segment(source, 0.0, MAX_SECONDS, config.sample_rate)
    level = files.level_db(wav)
    if level < _SILENCE_DB:
        raise ValueError(f"{name}: the recording is silent ({max(level, -120):.0f} dB)")
    wav = files.to_channels(wav, config.num_channels)
    return Recording(wav, encode_one(codec, wav), seconds)


def join(blocks: Sequence[Block], sample_rate: int) -> Recording:
    """The blocks of speech as a recording."""
    wav = np.clip(np.concatenate([block.wav for block in blocks], axis=1), -1, 1)
    codes = np.concatenate([block.codes for block in blocks], axis=1)
    return Recording(wav, codes, wav.shape[1] / sample_rate)


def to_mono(wav: np.ndarray) -> np.ndarray:
    """[C, S] as samples [S] for the page, little-endian float32 in [-1, 1]."""
    return np.clip(wav.mean(0), -1, 1).astype("<f4")


def reconstruct(codec: Codec, recording: Recording, num_quantizers: int) -> np.ndarray:
    """The reconstruction [C, S] from the first quantizers."""
    wav_hat = decode_one(codec, recording.codes, num_quantizers)
    return np.clip(wav_hat[:, : recording.wav.shape[1]], -1, 1)


def distances(recording: Recording, wav_hat: np.ndarray, sample_rate: int) -> dict[str, float]:
    """Metrics of a reconstruction; very short recordings have none."""
    names = ("mel_loss", "stft", "stoi")
    values, _ = metrics.compute_each(recording.wav, wav_hat, sample_rate, names)
    return values


def to_wav(wav: np.ndarray, sample_rate: int) -> bytes:
    """[C, S] as the bytes of a WAV file, 16 bit PCM."""
    buffer = io.BytesIO()
    soundfile.write(buffer, files.to_pcm16(wav).T, sample_rate, format="WAV")
    return buffer.getvalue()


def draw_spectrogram(wav: np.ndarray, reference: np.ndarray, sample_rate: int) -> bytes:
    """A mel spectrogram of [C, S] as PNG, low frequencies at the bottom.

    The loudest band of `reference` gets the brightest colour, so that pictures can be compared.
    """
    loudest = float(_mel_db(reference, sample_rate).max())
    return _to_png(_mel_db(wav, sample_rate), loudest - _RANGE_DB, loudest, "magma")


def frequency_ticks(sample_rate: int) -> list[dict[str, Any]]:
    """Labels of a spectrogram's frequency axis and their height, from 0 (bottom) to 1."""
    import librosa

    top = librosa.hz_to_mel(sample_rate / 2)
    ticks = []
    for hz in _TICKS:
        height = float(librosa.hz_to_mel(hz) / top)
        if height < 0.97:
            ticks.append({"label": f"{hz / 1000:g}k" if hz >= 1000 else str(hz), "height": height})
    return ticks


def draw_codes(codes: np.ndarray, codebook_size: int, num_quantizers: int) -> bytes:
    """Codes [Q, T] as PNG, a pixel each, the first quantizer at the top; unused rows are grey."""
    from matplotlib import colormaps

    pixels = colormaps["turbo"](codes / (codebook_size - 1))[..., :3]
    grey = 0.25 + 0.5 * (codes[num_quantizers:] / (codebook_size - 1))
    pixels[num_quantizers:] = grey[..., None]
    return _to_png(np.flipud(pixels), None, None, None)


def _mel_db(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """Mel spectrogram in dB [bands, columns] of [C, S]."""
    size = 2048 if sample_rate > 16000 else 1024
    mono = np.pad(wav.mean(0), size // 2)
    hop = max(size // 8, -(-wav.shape[1] // _COLUMNS))
    frames = np.lib.stride_tricks.sliding_window_view(mono, size)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(size))) ** 2
    return 10 * np.log10(_mel_matrix(sample_rate, size) @ power.T + 1e-10)


@functools.lru_cache(maxsize=2)
def _mel_matrix(sample_rate: int, size: int) -> np.ndarray:
    import librosa.filters

    return librosa.filters.mel(sr=sample_rate, n_fft=size, n_mels=_BANDS, norm=None)


def _to_png(image: np.ndarray, lowest: Any, highest: Any, colors: str | None) -> bytes:
    """An image [height, width] or [height, width, 3] as PNG, its first row at the bottom."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, image, lowest, highest, colors, format="png", origin="lower")
    return buffer.getvalue()
