"""Training losses. All are float32, and frames that touch padding weigh nothing."""

import jax
import jax.numpy as jnp

from moss_tok.audio import spectral
from moss_tok.codec.quantizer import Quantized

# Source: the paper's windows 2^5 .. 2^11 with the mel counts of the Descript Audio Codec.
MEL_SCALES = ((32, 5), (64, 10), (128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320))


def reconstruction_loss(
    wav: jax.Array, wav_hat: jax.Array, lengths: jax.Array, sample_rate: int
) -> jax.Array:
    """Multi-scale mel distance: the L1 distance of log10 mel spectrograms, summed over 7 scales.

    Args:
      wav: [B, C, S] reference.
      wav_hat: [B, C, S] reconstruction.
      lengths: [B] valid samples. A frame that reaches past them weighs nothing.
      sample_rate: Hz.

    Returns:
      [B]: per item the mean over valid frames, summed over scales.
    """
    batch, channels, num_samples = wav.shape
    total = jnp.zeros(batch)
    for window_length, num_mels in MEL_SCALES:
        # Not in one batch: the reference needs no gradient.
        reference, synthesis = (
            spectral.log_mel(x.reshape(-1, num_samples), sample_rate, window_length, num_mels)
            for x in (wav, wav_hat)
        )
        distance = jnp.abs(reference - synthesis).mean(-1)
        distance = distance.reshape(batch, channels, -1).mean(1)  # [B, T]
        valid = frame_mask(lengths, num_samples, window_length)
        total += masked_mean(distance, valid)
    return total


def frame_mask(lengths: jax.Array, num_samples: int, window_length: int) -> jax.Array:
    """Which frames of `spectral.frame` see no padding: bool [B, T]; all where nothing is padded."""
    ends = jnp.arange(1 + num_samples // (window_length // 4)) * (window_length // 4)
    inside = ends + window_length // 2 <= lengths[:, None]
    return inside | (lengths[:, None] >= num_samples)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the last axis where `mask` holds; 0 where it never does."""
    count = mask.sum(-1)
    return jnp.where(mask, x, 0).sum(-1) / jnp.maximum(count, 1)


def quantizer_losses(
    quantized: Quantized, keep: jax.Array, lengths: jax.Array, hop_length: int
) -> dict[str, jax.Array]:
    """Commitment and codebook losses: per item [B], means over frames summed over quantizers.

    Args:
      quantized: Output of the quantizer.
      keep: bool [B, Q], the quantizers in use.
      lengths: [B] valid samples.
      hop_length: Samples per frame.
    """
    num_frames = quantized.codes.shape[-1]
    valid = jnp.arange(num_frames) < -(-lengths // hop_length)[:, None]
    losses = {}
    for name in ("commitment_loss", "codebook_loss"):
        per_level = masked_mean(getattr(quantized, name), valid[None])  # [Q, B]
        losses[name] = (per_level.T * keep).sum(-1)
    return losses
