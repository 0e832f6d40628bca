"""Training losses. All are float32.

Frames that touch padding weigh nothing in the losses of spectra, waveforms and codes;
discriminators hear both signals with zeros for padding.
"""

import math

import jax
import jax.numpy as jnp

from moss_tok.audio import spectral
from moss_tok.codec.quantizer import Quantized

_BANDS_PER_SAMPLE = 5 / 32  # mel bands per sample of a window, as the Descript Audio Codec has it
_LOUDNESS_POWER = 0.45  # of a magnitude; Zwicker's law has 0.23 of the power


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
      lengths: [B] valid samples. A frame that reaches past them weighs nothing.
      sample_rate: Hz.
      windows: Their lengths, multiples of 32 samples.
      floor_db: What is silent, see `spectral.log_mel`; not in the paper.

    Returns:
      Per item [B], means over valid frames: "reconstruction_loss", the L1 distance of log10 mel
      spectrograms; "loudness_loss", that of mel spectrograms compressed as hearing does, relative
      to the reference. Not in the paper: loud bands count more than in the first, quiet ones less.
    """
    batch, channels, num_samples = wav.shape
    log_distance = jnp.zeros(batch)
    loudness_distance = jnp.zeros(batch)
    for window_length in windows:
        num_mels = int(_BANDS_PER_SAMPLE * window_length)
        valid = frame_mask(lengths, num_samples, window_length)

        def over_frames(x, valid=valid):
            return masked_mean(x.mean(-1).reshape(batch, channels, -1).mean(1), valid)

        # Not in one batch: the reference needs no gradient.
        reference, synthesis = (
            spectral.log_mel(
                x.reshape(-1, num_samples), sample_rate, window_length, num_mels, floor_db
            )
            for x in (wav, wav_hat)
        )
        log_distance += over_frames(jnp.abs(reference - synthesis))
        reference, synthesis = (10 ** (_LOUDNESS_POWER * x) for x in (reference, synthesis))
        distance = over_frames(jnp.abs(reference - synthesis))
        loudness_distance += distance / (over_frames(reference) + 1e-6)
    return {"reconstruction_loss": log_distance, "loudness_loss": loudness_distance}


def waveform_loss(wav: jax.Array, wav_hat: jax.Array, lengths: jax.Array) -> jax.Array:
    """L1 distance of the valid samples over the mean absolute reference: [B, C, S] -> [B].

    Not in the paper: a small model on little data needs it to keep phases, and with them pitch.
    """
    valid = jnp.arange(wav.shape[-1]) < lengths[:, None]
    distance, size = (masked_mean(jnp.abs(x).mean(1), valid) for x in (wav - wav_hat, wav))
    return distance / (size + 1e-3)


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


Features = list[jax.Array]  # the outputs of a discriminator's layers [B, ..., F]


def discriminator_loss(real: Features, fake: Features) -> jax.Array:
    """Least squares: judgements go to 1 on recordings, to 0 on reconstructions; [B]."""
    return item_mean(jnp.square(1 - f32(real[-1]))) + item_mean(jnp.square(f32(fake[-1])))


def adversarial_loss(fake: Features) -> jax.Array:
    """Least squares: the generator wants to be judged 1; [B]."""
    return item_mean(jnp.square(1 - f32(fake[-1])))


def feature_matching_loss(real: Features, fake: Features) -> jax.Array:
    """L1 distance of inner features over the mean absolute real feature; mean over layers, [B].

    Source: EnCodec, equation 2 of its section 3.4.
    """
    layers = [
        item_mean(jnp.abs(f32(x) - f32(y))) / (item_mean(jnp.abs(f32(x))) + 1e-6)
        for x, y in zip(real[:-1], fake[:-1], strict=True)
    ]
    return sum(layers) / len(layers)


def f32(x: jax.Array) -> jax.Array:
    """`x` in float32."""
    return x.astype(jnp.float32)


def item_mean(x: jax.Array) -> jax.Array:
    """Mean over all axes but the first: [B, ...] -> [B]."""
    return x.mean(tuple(range(1, x.ndim)))
