"""Short-time spectra and mel spectrograms in jnp, for losses on the device."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


@functools.lru_cache(maxsize=64)
def mel_filters(sample_rate: int, window_length: int, num_mels: int) -> np.ndarray:
    """Slaney mel filters from 0 Hz to half the sample rate, float32 [window / 2 + 1, num_mels].

    Filters narrower than a bin are empty. They are left out, so there may be fewer columns.
    """
    import warnings

    import librosa.filters  # slow to import, and only training needs it

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Empty filters")
        filters = librosa.filters.mel(sr=sample_rate, n_fft=window_length, n_mels=num_mels).T
    return np.ascontiguousarray(filters[:, filters.sum(0) > 0])


def frame(wav: jax.Array, window_length: int) -> jax.Array:
    """Centred frames a quarter of a window apart; the ends are padded by reflection.

    Args:
      wav: [B, S], S >= window_length.
      window_length: A multiple of 4, samples.

    Returns:
      [B, 1 + S // (window_length / 4), window_length].
    """
    hop = window_length // 4
    half = window_length // 2
    num_frames = 1 + wav.shape[-1] // hop
    wav = jnp.pad(wav, ((0, 0), (half, half)), mode="reflect")
    num_hops = num_frames + 3
    hops = wav[:, : num_hops * hop].reshape(wav.shape[0], num_hops, hop)
    quarters = [hops[:, i : i + num_frames] for i in range(4)]
    return jnp.concatenate(quarters, axis=-1)


def stft(wav: jax.Array, window_length: int) -> jax.Array:
    """Complex spectra [B, S] -> [B, T, window_length / 2 + 1], periodic Hann window."""
    hann = np.hanning(window_length + 1)[:-1].astype(np.float32)
    return jnp.fft.rfft(frame(wav, window_length) * hann)


def magnitude(wav: jax.Array, window_length: int) -> jax.Array:
    """Magnitudes of `stft`, softened by 1e-6."""
    return absolute(stft(wav, window_length), 1e-6)


def absolute(x: jax.Array, softening: float) -> jax.Array:
    """Magnitudes of complex numbers, at least `softening`, so the gradient is finite at zero."""
    return jnp.sqrt(jnp.square(x.real) + jnp.square(x.imag) + softening**2)


_BLOCK_MELS = 320  # filters per block; a block needs only a part of the spectrum


def _apply(filters: np.ndarray, magnitudes: jax.Array) -> jax.Array:
    """Applies filters [F, M]: [B, T, F] -> [B, T, M]; in blocks, because most entries are zero."""
    blocks = []
    for start in range(0, filters.shape[1], _BLOCK_MELS):
        block = filters[:, start : start + _BLOCK_MELS]
        used_bins = np.flatnonzero(block.any(1))
        low = used_bins[0]
        high = used_bins[-1] + 1
        band = magnitudes[..., low:high]
        blocks.append(jnp.einsum("btf,fm->btm", band, block[low:high]))
    return jnp.concatenate(blocks, axis=-1)


def log_mel(
    wav: jax.Array,
    sample_rate: int,
    window_length: int,
    num_mels: int,
    floor_db: float = -math.inf,
) -> jax.Array:
    """log10 of the mel spectrogram: [B, S] -> [B, T, num_mels].

    Values are clamped at 1e-5, or at the value of white noise at `floor_db` (RMS re full scale) if
    that is larger. A value of 1e-5 is that of noise at -54 dB for windows of 32 samples, and at
    -108 dB for windows of 2048.
    """
    filters = mel_filters(sample_rate, window_length, num_mels)
    mel = _apply(filters, magnitude(wav, window_length))
    # The level of noise in a Hann window, with filters of area 1 Hz.
    noise_rms = 10 ** (floor_db / 20)
    noise = noise_rms * math.sqrt(0.375 * window_length) * window_length / sample_rate
    floor = max(1e-5, noise)
    return jnp.log10(jnp.maximum(mel, floor))
