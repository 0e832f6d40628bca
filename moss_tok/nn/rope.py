"""Rotary position embedding in fixed point."""

import jax
import jax.numpy as jnp
import numpy as np


def rope_table(positions: jax.Array, head_dim: int, max_period: float) -> jax.Array:
    """Cosines and sines of the rotary phases.

    The phase is (position * frequency) modulo one turn, computed in fixed point. The frequency, in
    turns per frame, is a 64-bit fraction in two uint32 words. The product wraps around exactly, so
    phases after days of a stream are as precise as at its start. Float32 phases would be wrong by
    0.2 rad after a day.

    Args:
      positions: [..., T] integers >= 0.
      head_dim: H.
      max_period: Longest period in frames over 2 pi.

    Returns:
      [2, ..., T, H / 2] float32: cosines, sines.
    """
    exponents = np.arange(head_dim // 2, dtype=np.float64) * 2 / head_dim
    turns = np.float64(max_period) ** -exponents / (2 * np.pi)  # per frame
    high_words = []
    low_words = []
    for frequency in turns:
        fraction = int(frequency * 2.0**64)
        high_words.append(fraction >> 32)
        low_words.append(fraction & 0xFFFFFFFF)
    high = jnp.asarray(np.array(high_words, np.uint32))
    low = np.array(low_words, np.uint32)
    position = positions.astype(jnp.uint32)[..., None]
    # Wraps around modulo 2^32, which is one turn. The cast to int32 centers the phase on zero.
    phase = (position * high + _multiply_high(position, low)).astype(jnp.int32)
    radians = phase.astype(jnp.float32) * np.float32(2 * np.pi / 2**32)
    return jnp.stack([jnp.cos(radians), jnp.sin(radians)])


def _multiply_high(a: jax.Array, b: np.ndarray) -> jax.Array:
    """Upper 32 bits of the 64-bit product of uint32 values, computed from 16-bit halves."""
    a_high = a >> 16
    a_low = a & 0xFFFF
    b_high = jnp.asarray(b >> 16)
    b_low = jnp.asarray(b & 0xFFFF)
    middle = a_high * b_low + (a_low * b_low >> 16)
    carry = a_low * b_high + (middle & 0xFFFF)
    return a_high * b_high + (middle >> 16) + (carry >> 16)


def apply_rope(x: jax.Array, table: jax.Array) -> jax.Array:
    """Rotates the halves of each head of `x` [B, N, T, H] in float32; the result has x's dtype."""
    cos, sin = table
    a, b = jnp.split(x, 2, axis=-1)
    a = a.astype(jnp.float32)
    b = b.astype(jnp.float32)
    rotated_a = (a * cos - b * sin).astype(x.dtype)
    rotated_b = (a * sin + b * cos).astype(x.dtype)
    return jnp.concatenate([rotated_a, rotated_b], axis=-1)
