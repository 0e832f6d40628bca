"""Reconstruction metrics, computed on the host exactly as the published evaluation protocol does.

Source: OpenMOSS/MOSS-Audio-Tokenizer-Eval (moss_eval.metrics.core); tests/golden has its results.
"""

import functools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from moss_tok import extras

_RATE = 16000  # Hz
_PACKAGES = {"pesq-nb": "pesq", "pesq-wb": "pesq", "sdr": "mir_eval"}  # in the extra `eval`
_SAMPLES_AT_ONCE = 2**16  # that the resampler computes; this bounds its memory
_WINDOWS_AT_ONCE = 4096  # whose spectra are computed; this bounds their memory
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
      ValueError: A metric is unknown, its package is missing, an array is empty or not [C, S], or a
        metric is not defined for these signals (such as PESQ without speech).
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
    reference: np.ndarray,
    synthesis: np.ndarray,
    sample_rate: int,
    metrics: Sequence[str],
) -> tuple[dict[str, float], dict[str, str]]:
    """Compares as `compute` does, and collects metrics that are not defined instead of raising.

    Returns:
      Name -> value, and name -> why the metric is not defined.

    Raises:
      ValueError: A metric is unknown, its package is missing, or an array is empty or not [C, S].
    """
    check(metrics)
    reference = np.asarray(reference, np.float32)
    synthesis = np.asarray(synthesis, np.float32)
    for wav in (reference, synthesis):
        if wav.ndim != 2 or wav.size == 0:
            shapes = [reference.shape, synthesis.shape]
            raise ValueError(f"need audio of the shape [C, S], got {shapes}")
    reference = _to_mono(reference, sample_rate)
    synthesis = _to_mono(synthesis, sample_rate)
    size = min(reference.size, synthesis.size)
    values = {}
    errors = {}
    for name in metrics:
        try:
            value = METRICS[name](reference[:size], synthesis[:size])
        except ValueError as error:
            errors[name] = str(error)
        else:
            values[name] = _finite(value)
    return values, errors


def _to_mono(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """Audio [C, S] as one channel at 16 kHz, [S']."""
    return resample(wav, sample_rate, _RATE).mean(0)


def _finite(value: float) -> float:
    return float(value) if math.isfinite(value) else 0.0


@functools.lru_cache(maxsize=32)
def _sinc_kernels(rate_in: int, rate_out: int) -> np.ndarray:
    """A Hann-windowed sinc [rate_out, 2 * width + 1] for each position between two input samples.

    Kernel k is for an output sample that is k / rate_out of an input sample after its middle tap.
    """
    cutoff = min(rate_in, rate_out) * 0.99
    width = math.ceil(6 * rate_in / cutoff)
    taps = np.arange(-width, width + 1)
    positions = np.arange(rate_out)[:, None] / rate_out
    t = np.clip((taps - positions) * cutoff / rate_in, -6, 6)
    window = np.cos(t * np.pi / 12) ** 2
    return np.sinc(t) * window * cutoff / rate_in


def resample(wav: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """Resamples [C, S] with a Hann-windowed sinc: six zero crossings, rolloff 0.99.

    These are the defaults of torchaudio.functional.resample, which the protocol uses.
    """
    if rate_in == rate_out:
        return wav
    divisor = math.gcd(rate_in, rate_out)
    rate_in //= divisor
    rate_out //= divisor
    kernels = _sinc_kernels(rate_in, rate_out)
    width = kernels.shape[1] // 2
    size = -(-wav.shape[-1] * rate_out // rate_in)  # rounded up
    padded = np.pad(wav.astype(np.float64), ((0, 0), (width, width)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernels.shape[1], axis=-1)  # a view
    resampled = np.empty((wav.shape[0], size), np.float32)
    for start in range(0, size, _SAMPLES_AT_ONCE):
        times = np.arange(start, min(start + _SAMPLES_AT_ONCE, size), dtype=np.int64) * rate_in
        middle_taps, positions = np.divmod(times, rate_out)
        for channel in range(wav.shape[0]):
            parts = np.einsum("st,st->s", windows[channel, middle_taps], kernels[positions])
            resampled[channel, start : start + times.size] = parts
    return resampled


def _spectra(
    reference: np.ndarray, synthesis: np.ndarray, window_length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the magnitudes [F, T] of both signals, some windows at a time to bound the memory.

    Windows are centred, square roots of periodic Hann windows; the signals are reflected at their
    ends.
    """
    hop = window_length // 4
    half = window_length // 2
    window = np.sqrt(np.hanning(window_length + 1)[:-1])
    if reference.size <= half:
        raise ValueError(f"needs more than {half} samples at 16 kHz, got {reference.size}")
    frames = []
    for wav in (reference, synthesis):
        wav = np.pad(wav.astype(np.float64), half, mode="reflect")
        frames.append(np.lib.stride_tricks.sliding_window_view(wav, window_length)[::hop])
    for start in range(0, len(frames[0]), _WINDOWS_AT_ONCE):
        spectra = [np.fft.rfft(x[start : start + _WINDOWS_AT_ONCE] * window) for x in frames]
        yield np.abs(spectra[0]).T, np.abs(spectra[1]).T


@functools.lru_cache(maxsize=8)
def _mel_matrix(window_length: int, num_mels: int) -> np.ndarray:
    import librosa.filters

    return librosa.filters.mel(sr=_RATE, n_fft=window_length, n_mels=num_mels, fmax=_RATE / 2)


def _log_power(magnitudes: np.ndarray) -> np.ndarray:
    return np.log10(np.maximum(magnitudes, 1e-5) ** 2)


def _distance(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean absolute difference of magnitudes plus that of their log10 power, over all pairs."""
    total = 0.0
    size = 0
    for a, b in pairs:
        total += np.abs(_log_power(a) - _log_power(b)).sum() + np.abs(a - b).sum()
        size += a.size
    return total / size


def mel_loss(reference: np.ndarray, synthesis: np.ndarray) -> float:
    """Mel distance of 16 kHz mono signals: L1 of log10 power plus L1, summed over two windows."""
    total = 0.0
    for window_length, num_mels in _MEL_WINDOWS:
        matrix = _mel_matrix(window_length, num_mels)
        spectra = _spectra(reference, synthesis, window_length)
        total += _distance((matrix @ a, matrix @ b) for a, b in spectra)
    return total


def stft(reference: np.ndarray, synthesis: np.ndarray) -> float:
    """Distance of 16 kHz mono signals as in `mel_loss`, on STFT magnitudes without mel bands."""
    return sum(_distance(_spectra(reference, synthesis, window)) for window, _ in _MEL_WINDOWS)


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
        spectrum = np.abs(librosa.stft(reference))
        spectrum_hat = np.abs(librosa.stft(synthesis))
    distance = np.linalg.norm(spectrum - spectrum_hat)
    return distance / (np.linalg.norm(spectrum) + 1e-12)


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
    reference = reference / (np.linalg.norm(reference) + 1e-10)
    synthesis = synthesis / (np.linalg.norm(synthesis) + 1e-10)
    projected = np.dot(reference, synthesis) * reference
    error_power = np.mean(np.square(synthesis - projected)) + 1e-10
    with np.errstate(divide="ignore"):
        return 10 * np.log10(np.mean(np.square(reference)) / error_power)


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
