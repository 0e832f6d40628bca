"""Training losses, all in float32.

Losses of spectra, waveforms and codes ignore frames that touch padding. The discriminators get both
signals with padding set to 0.
"""

import functools
import math

import jax
import jax.numpy as jnp

from moss_tok.audio import spectral
from moss_tok.codec.quantizer import Quantized

_BANDS_PER_SAMPLE = 5 / 32  # mel bands per sample of a window, as in the Descript Audio Codec
_SOFTEST = 1e-4  # magnitudes of complex spectra are softened by it: their power is steep at 0
_LOUDNESS_POWER = 0.45  # exponent on magnitudes; Zwicker's law has 0.23 on powers


def reconstruction_losses(
    wav: jax.Array,
    wav_hat: jax.Array,
    lengths: jax.Array,
    sample_rate: int,
    windows: tuple[int, ...],
    floor_db: float = -math.inf,
) -> dict[str, jax.Array]:
    """Multi-scale mel distances, summed over windows.

    Args:
      wav: [B, C, S] reference.
      wav_hat: [B, C, S] reconstruction.
      lengths: [B] valid samples. Frames that reach past them are ignored.
      sample_rate: Hz.
      windows: Window lengths in samples, multiples of 32.
      floor_db: Floor of mel bands, see `spectral.log_mel`; not in the paper.

    Returns:
      Per item [B], means over valid frames: "reconstruction_loss", the L1 distance of log10 mel
      spectrograms; and "loudness_loss", the L1 distance of mel spectrograms that are compressed as
      in hearing, relative to the reference. The second is not in the paper; loud bands count more
      than in the first, quiet ones less.
    """
    batch, _, num_samples = wav.shape
    log_distance = jnp.zeros(batch)
    loudness_distance = jnp.zeros(batch)
    for window_length in windows:
        num_mels = int(_BANDS_PER_SAMPLE * window_length)
        over_frames = functools.partial(
            frame_mean, mask=frame_mask(lengths, num_samples, window_length)
        )

        def log_mel(x, window_length=window_length, num_mels=num_mels):
            x = x.reshape(-1, num_samples)
            return spectral.log_mel(x, sample_rate, window_length, num_mels, floor_db)

        # Not in one batch, because the reference needs no gradient.
        reference = log_mel(wav)
        synthesis = log_mel(wav_hat)
        log_distance += over_frames(jnp.abs(reference - synthesis))
        reference = 10 ** (_LOUDNESS_POWER * reference)
        synthesis = 10 ** (_LOUDNESS_POWER * synthesis)
        distance = over_frames(jnp.abs(reference - synthesis))
        loudness_distance += distance / (over_frames(reference) + 1e-6)
    return {"reconstruction_loss": log_distance, "loudness_loss": loudness_distance}


def spectrum_loss(
    wav: jax.Array,
    wav_hat: jax.Array,
    lengths: jax.Array,
    windows: tuple[int, ...],
) -> jax.Array:
    """Multi-scale distance of complex spectra with compressed magnitudes, summed over windows.

    Not in the paper; speech separation uses it (Ephrat et al., 2018, arXiv 1804.03619).
    Unlike the mel losses, it sees phases and signs; unlike `waveform_loss`, also in quiet bands.

    Args:
      wav: [B, C, S] reference.
      wav_hat: [B, C, S] reconstruction.
      lengths: [B] valid samples. Frames that reach past them are ignored.
      windows: Window lengths in samples, multiples of 4.

    Returns:
      [B], per window the mean distance in the complex plane over the mean compressed magnitude of
      the reference.
    """
    batch, _, num_samples = wav.shape
    total = jnp.zeros(batch)
    for window_length in windows:
        over_frames = functools.partial(
            frame_mean, mask=frame_mask(lengths, num_samples, window_length)
        )

        def compressed(x, window_length=window_length):
            spectra = spectral.stft(x.reshape(-1, num_samples), window_length)
            size = spectral.absolute(spectra, _SOFTEST)
            return spectra * size ** (_LOUDNESS_POWER - 1)

        reference = compressed(wav)
        difference = spectral.absolute(reference - compressed(wav_hat), _SOFTEST)
        size = spectral.absolute(reference, _SOFTEST)
        total += over_frames(difference) / (over_frames(size) + 1e-6)
    return total


def waveform_loss(wav: jax.Array, wav_hat: jax.Array, lengths: jax.Array) -> jax.Array:
    """L1 distance of valid samples, divided by the mean absolute reference: [B, C, S] -> [B].

    Not in the paper; a small model on little data needs it to learn phases, and therefore pitch.
    """
    valid = jnp.arange(wav.shape[-1]) < lengths[:, None]
    distance = masked_mean(jnp.abs(wav - wav_hat).mean(1), valid)
    size = masked_mean(jnp.abs(wav).mean(1), valid)
    return distance / (size + 1e-3)


def frame_mask(lengths: jax.Array, num_samples: int, window_length: int) -> jax.Array:
    """Bool [B, T]: frames of `spectral.frame` without padding; all frames of unpadded items."""
    hop = window_length // 4
    centers = jnp.arange(1 + num_samples // hop) * hop
    is_inside = centers + window_length // 2 <= lengths[:, None]
    is_unpadded = lengths[:, None] >= num_samples
    return is_inside | is_unpadded


def frame_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over channels, bins and the frames of a mask [B, T]: [B * C, T, F] -> [B]."""
    batch, num_frames = mask.shape
    return masked_mean(x.mean(-1).reshape(batch, -1, num_frames).mean(1), mask)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the last axis where `mask` is true; 0 where it is false everywhere."""
    total = jnp.where(mask, x, 0).sum(-1)
    count = mask.sum(-1)
    return total / jnp.maximum(count, 1)


def quantizer_losses(
    quantized: Quantized,
    in_use: jax.Array,
    lengths: jax.Array,
    hop_length: int,
) -> dict[str, jax.Array]:
    """Commitment and codebook losses per item [B]: means over frames, summed over quantizers.

    Args:
      quantized: Output of the quantizer.
      in_use: bool [B, Q], the quantizers in use.
      lengths: [B] valid samples.
      hop_length: Samples per frame.
    """
    num_frames = quantized.codes.shape[-1]
    valid = jnp.arange(num_frames) < -(-lengths // hop_length)[:, None]
    losses = {}
    for name in ("commitment_loss", "codebook_loss"):
        per_level = masked_mean(getattr(quantized, name), valid[None])  # [Q, B]
        losses[name] = (per_level.T * in_use).sum(-1)
    return losses


Features = list[jax.Array]  # outputs of a discriminator's layers [B, ..., F], the score last


def discriminator_loss(real: Features, fake: Features) -> jax.Array:
    """Least squares: scores should be 1 for recordings and 0 for reconstructions; [B]."""
    real_score = f32(real[-1])
    fake_score = f32(fake[-1])
    return item_mean(jnp.square(1 - real_score)) + item_mean(jnp.square(fake_score))


def adversarial_loss(fake: Features) -> jax.Array:
    """Least squares: the generator aims at a score of 1; [B]."""
    return item_mean(jnp.square(1 - f32(fake[-1])))


def feature_matching_loss(real: Features, fake: Features) -> jax.Array:
    """L1 distance of hidden features over the mean absolute real feature; mean over layers, [B].

    Source: EnCodec, equation 2 of its section 3.4.
    """
    distances = []
    for x, y in zip(real[:-1], fake[:-1], strict=True):
        x = f32(x)
        y = f32(y)
        size = item_mean(jnp.abs(x)) + 1e-6
        distances.append(item_mean(jnp.abs(x - y)) / size)
    return sum(distances) / len(distances)


def f32(x: jax.Array) -> jax.Array:
    """`x` in float32."""
    return x.astype(jnp.float32)


def item_mean(x: jax.Array) -> jax.Array:
    """Mean over all axes but the first: [B, ...] -> [B]."""
    return x.mean(tuple(range(1, x.ndim)))
