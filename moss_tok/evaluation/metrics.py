"""Reconstruction metrics, computed on the host exactly as the published evaluation protocol does.

Source: OpenMOSS/MOSS-Audio-Tokenizer-Eval (moss_eval.metrics.core); tests/golden has its results.
"""

import functools
import math
import warnings
from collections.abc import Sequence

import numpy as np
import scipy.signal

from moss_tok import extras

_RATE = 16000
_PACKAGES = {"pesq-nb": "pesq", "pesq-wb": "pesq", "sdr": "mir_eval"}  # in the extra `eval`
_BLOCKS_AT_ONCE = 4096  # of the resampler, to bound its memory
_MEL_WINDOWS = ((2048, 150), (512, 80))  # window length in samples, number of mel bands


def compute(
    reference: np.ndarray,
    synthesis: np.ndarray,
    sample_rate: int,
    metrics: tuple[str, ...] = ("mel_loss", "stft", "stoi"),
) -> dict[str, float]:
    """Compares a reconstruction with its reference.

    Both are resampled to 16 kHz per channel, averaged to mono and cut to the shorter length.

    Args:
      reference: [C, S] float in [-1, 1].
      synthesis: [C, S'] float.
      sample_rate: Sample rate of both in Hz.
      metrics: Names in METRICS: "mel_loss", "stft", "spectral_convergence" (lower is better),
        "stoi" (0 to 1), "pesq-nb", "pesq-wb" (1 to 4.6), "sdr", "sisdr" (dB). "pesq-nb", "pesq-wb"
        and "sdr" need the extra `eval`.

    Returns:
      Name -> value; a value that is not finite becomes 0.

    Raises:
      ValueError: An unknown metric, arrays that are not [C, S] or are empty, a metric that is not
        defined for them (such as PESQ without speech), or a missing package.
    """
    values, errors = compute_each(reference, synthesis, sample_rate, metrics)
    if errors:
        raise ValueError(next(iter(errors.values())))
    return values


def check(metrics: Sequence[str]) -> None:
    """Raises ValueError if a metric is unknown, or its package is not installed."""
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}; accepted: {', '.join(METRICS)}")
    for name in metrics:
        package = _PACKAGES.get(name)
        if package and not extras.is_installed(package):
            raise ValueError(f"{name} needs the extra: {extras.install('eval')}")


def compute_each(
    reference: np.ndarray, synthesis: np.ndarray, sample_rate: int, metrics: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Compares as `compute` does, and collects metrics that are not defined instead of raising.

    Returns:
      Name -> value, and name -> why the metric is not defined.

    Raises:
      ValueError: An unknown metric, a missing package, or arrays that are not [C, S] or are empty.
    """
    check(metrics)
    pair = [np.asarray(x, np.float32) for x in (reference, synthesis)]
    if any(x.ndim != 2 or x.size == 0 for x in pair):
        raise ValueError(f"need audio of the shape [C, S], got {[x.shape for x in pair]}")
    size = min(-(-x.shape[-1] * _RATE // sample_rate) for x in pair)
    mono = [resample(x, sample_rate, _RATE).mean(0)[:size] for x in pair]
    values = {}
    errors = {}
    for name in metrics:
        try:
            values[name] = _finite(METRICS[name](*mono))
        except ValueError as error:
            errors[name] = str(error)
    return values, errors


def _finite(value: float) -> float:
    return float(value) if math.isfinite(value) else 0.0


@functools.lru_cache(maxsize=32)
def _sinc_kernels(rate_in: int, rate_out: int) -> tuple[np.ndarray, int]:
    """A Hann-windowed sinc per output phase [rate_out, taps]; the number of taps before time 0."""
    cutoff = min(rate_in, rate_out) * 0.99
    width = math.ceil(6 * rate_in / cutoff)
    taps = np.arange(-width, width + rate_in) / rate_in
    phases = -np.arange(rate_out)[:, None] / rate_out
    t = np.clip((taps + phases) * cutoff, -6, 6)
    return np.sinc(t) * np.cos(t * np.pi / 12) ** 2 * cutoff / rate_in, width


def resample(wav: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """Resamples [C, S] with a Hann-windowed sinc: six zero crossings, rolloff 0.99.

    These are the defaults of torchaudio.functional.resample, which the protocol uses.
    """
    if rate_in == rate_out:
        return wav
    divisor = math.gcd(rate_in, rate_out)
    rate_in //= divisor
    rate_out //= divisor
    kernels, width = _sinc_kernels(rate_in, rate_out)
    size = -(-wav.shape[-1] * rate_out // rate_in)
    wav = np.pad(wav.astype(np.float64), ((0, 0), (width, width + rate_in)))
    windows = np.lib.stride_tricks.sliding_window_view(wav, kernels.shape[1], axis=-1)
    windows = windows[:, ::rate_in]  # [C, blocks, taps], a view; einsum copies a part at a time
    parts = []
    for start in range(0, windows.shape[1], _BLOCKS_AT_ONCE):
        part = windows[:, start : start + _BLOCKS_AT_ONCE]
        resampled = np.einsum("cbt,pt->cbp", part, kernels, optimize=True)
        parts.append(resampled.reshape(wav.shape[0], -1).astype(np.float32))
    return np.concatenate(parts, axis=1)[:, :size]


def _spectrum(wav: np.ndarray, window_length: int) -> np.ndarray:
    """Magnitudes [F, T]: square root of the periodic Hann window, centred, ends reflected."""
    hop = window_length // 4
    half = window_length // 2
    window = np.sqrt(scipy.signal.get_window("hann", window_length))
    if wav.size <= half:
        raise ValueError(f"needs more than {half} samples at 16 kHz, got {wav.size}")
    wav = np.pad(wav.astype(np.float64), half, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(wav, window_length)[::hop]
    return np.abs(np.fft.rfft(frames * window)).T


@functools.lru_cache(maxsize=8)
def _mel_matrix(window_length: int, num_mels: int) -> np.ndarray:
    import librosa.filters

    return librosa.filters.mel(sr=_RATE, n_fft=window_length, n_mels=num_mels, fmax=_RATE / 2)


def _spectral_distance(reference: np.ndarray, synthesis: np.ndarray, mel: bool) -> float:
    total = 0.0
    for window_length, num_mels in _MEL_WINDOWS:
        pair = [_spectrum(x, window_length) for x in (reference, synthesis)]
        if mel:
            pair = [_mel_matrix(window_length, num_mels) @ x for x in pair]
        logs = [np.log10(np.maximum(x, 1e-5) ** 2) for x in pair]
        total += np.abs(logs[0] - logs[1]).mean() + np.abs(pair[0] - pair[1]).mean()
    return total


def mel_loss(reference: np.ndarray, synthesis: np.ndarray) -> float:
    """Mel distance of 16 kHz mono signals: L1 of log10 power plus L1, summed over two windows."""
    return _spectral_distance(reference, synthesis, mel=True)


def stft(reference: np.ndarray, synthesis: np.ndarray) -> float:
    """Distance of 16 kHz mono signals as in `mel_loss`, on STFT magnitudes without mel bands."""
    return _spectral_distance(reference, synthesis, mel=False)


def stoi(reference: np.ndarray, synthesis: np.ndarray) -> float:
    """Short-time objective intelligibility (pystoi, not extended) of 16 kHz mono signals."""
    import pystoi

    with warnings.catch_warnings():  # too little speech gives 1e-5, as in the protocol
        warnings.filterwarnings("ignore", message="Not enough STFT frames")
        return pystoi.stoi(reference, synthesis, _RATE, extended=False)


def pesq(reference: np.ndarray, synthesis: np.ndarray, band: str) -> float:
    """PESQ of 16 kHz mono signals; `band` is "nb" or "wb"."""
    import pesq as implementation

    try:
        return implementation.pesq(_RATE, reference, synthesis, band)
    except (implementation.PesqError, ValueError) as error:
        raise ValueError(f"pesq-{band}: {error}") from error


def spectral_convergence(reference: np.ndarray, synthesis: np.ndarray) -> float:
    """Distance of magnitude spectra (librosa's defaults), relative to the reference's norm."""
    import librosa

    with warnings.catch_warnings():  # librosa warns of signals shorter than a window
        warnings.filterwarnings("ignore", message="n_fft=")
        pair = [np.abs(librosa.stft(x)) for x in (reference, synthesis)]
    return np.linalg.norm(pair[0] - pair[1]) / (np.linalg.norm(pair[0]) + 1e-12)


def sdr(reference: np.ndarray, synthesis: np.ndarray) -> float:
    """Signal-to-distortion ratio in dB after the best filter of 512 taps (BSS eval)."""
    import mir_eval

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        (value,), *_ = mir_eval.separation.bss_eval_sources(reference[None], synthesis[None])
    return value


def sisdr(reference: np.ndarray, synthesis: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio in dB."""
    # The protocol's 1e-10 matter in silence and at high ratios: 0.005 dB at 24 dB.
    r = reference / (np.linalg.norm(reference) + 1e-10)
    s = synthesis / (np.linalg.norm(synthesis) + 1e-10)
    projected = np.dot(r, s) * r
    error = np.mean(np.square(s - projected)) + 1e-10
    with np.errstate(divide="ignore"):
        return 10 * np.log10(np.mean(np.square(r)) / error)


METRICS = {
    "stoi": stoi,
    "pesq-nb": functools.partial(pesq, band="nb"),
    "pesq-wb": functools.partial(pesq, band="wb"),
    "mel_loss": mel_loss,
    "stft": stft,
    "spectral_convergence": spectral_convergence,
    "sdr": sdr,
    "sisdr": sisdr,
}
