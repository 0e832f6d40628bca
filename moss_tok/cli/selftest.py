"""The self-test of `moss-tok doctor`: checks of the codec in the package without stored answers.

The codec changes from version to version, so the answers are compared with each other and with the
input instead: a machine that computes wrongly does not pass by chance.
"""

import jax
import numpy as np

import moss_tok
from moss_tok import assets
from moss_tok.codec.inference import Codec

_SECONDS = 1.0
_WINDOW = 960  # samples of a frame in `_band_levels`
# Reconstructions reach 0.88, audio of random codes 0.3.
_LOWEST_CORRELATION = 0.7
# Two codebook entries can be equally near, so that rounding decides.
_LOWEST_SHARE = 0.99


def run() -> list[tuple[bool, str]]:
    """Encodes and decodes a synthetic voice; whether each check passed, and what it found."""
    codec = moss_tok.load(assets.codec_folder())
    wav = _voice(codec.config.sample_rate)
    codes = np.asarray(moss_tok.encode(codec, wav[None, None]).codes)
    checks = [_check_stream(codec, wav, codes[0])]
    if _on_accelerator():
        checks.append(_check_cpu(codec, wav, codes))
    wav_hat = np.asarray(moss_tok.decode(codec, codes).wav)[0, 0, : len(wav)]
    return [*checks, _check_audio(wav, wav_hat)]


def _on_accelerator() -> bool:
    return jax.default_backend() != "cpu"


def _voice(sample_rate: int) -> np.ndarray:
    """Three syllables of a synthetic voice [S]: harmonics of 120 Hz below three formants."""
    time = np.arange(round(_SECONDS * sample_rate)) / sample_rate
    pitch = 120 + 20 * np.sin(2 * np.pi * 1.5 * time)  # Hz
    phase = 2 * np.pi * np.cumsum(pitch) / sample_rate
    wav = np.zeros_like(time)
    for number in range(1, 40):
        gain = 0.02
        for formant, width in ((500, 150), (1500, 250), (2500, 300)):
            gain += np.exp(-(((120 * number - formant) / width) ** 2))
        wav += gain * np.sin(number * phase)
    syllables = 0.5 - 0.5 * np.cos(2 * np.pi * 3 * time)
    return (0.05 * syllables * wav).astype(np.float32)


def _check_stream(codec: Codec, wav: np.ndarray, codes: np.ndarray) -> tuple[bool, str]:
    size = len(wav) // 3  # no whole number of frames
    with moss_tok.EncoderStream(codec, chunk_frames=[8]) as stream:
        parts = [stream.push(wav[None, at : at + size]) for at in range(0, len(wav), size)]
        parts.append(stream.finish())
    share = float(np.mean(np.concatenate(parts, axis=1) == codes))
    return share >= _LOWEST_SHARE, f"{share:.1%} of the codes of a stream equal those of encode"


def _check_cpu(codec: Codec, wav: np.ndarray, codes: np.ndarray) -> tuple[bool, str]:
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        on_cpu = jax.device_put(codec, cpu)
        expected = np.asarray(moss_tok.encode(on_cpu, wav[None, None]).codes)
    share = float(np.mean(expected == codes))
    name = jax.default_backend()
    return share >= _LOWEST_SHARE, f"{share:.1%} of the codes of {name} equal those of the CPU"


def _check_audio(wav: np.ndarray, wav_hat: np.ndarray) -> tuple[bool, str]:
    if not np.isfinite(wav_hat).all():
        return False, "the decoded audio has samples that are not finite numbers"
    levels = [_band_levels(x).ravel() for x in (wav, wav_hat)]
    correlation = float(np.corrcoef(*levels)[0, 1])
    passed = correlation >= _LOWEST_CORRELATION
    return passed, f"band levels of the decoded audio and the input correlate by {correlation:.2f}"


def _band_levels(wav: np.ndarray) -> np.ndarray:
    """Levels in dB of 20 bands [T, 20], from 4 bins up to the highest, in frames of 40 ms."""
    frames = wav[: len(wav) // _WINDOW * _WINDOW].reshape(-1, _WINDOW) * np.hanning(_WINDOW)
    power = np.abs(np.fft.rfft(frames)) ** 2
    edges = np.geomspace(4, power.shape[1] - 1, 21).astype(int)
    bands = [power[:, low:high].sum(axis=1) for low, high in zip(edges, edges[1:], strict=False)]
    return 10 * np.log10(np.stack(bands, axis=1) + 1e-4)
