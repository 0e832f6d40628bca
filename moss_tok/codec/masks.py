"""Masks of what is valid in a batch: entries before the lengths, and the first quantizers."""

import jax
import jax.numpy as jnp
import numpy as np


def zero_past(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """Sets x [B, *, size] to zero past the lengths [B]; NaN there is replaced, too."""
    return jnp.where(valid_mask(x.shape[-1], lengths)[:, None], x, 0)


def valid_mask(size: int, lengths: jax.Array) -> jax.Array:
    """Bool [B, size], true before the lengths [B]."""
    return jnp.arange(size) < lengths[:, None]


def prefix_mask(codes: jax.Array | np.ndarray, num_quantizers: int | jax.Array) -> jax.Array:
    """Bool [B, q] for codes [B, q, T], true for the first `num_quantizers`, which may be traced."""
    return jnp.broadcast_to(jnp.arange(codes.shape[1]) < num_quantizers, codes.shape[:2])
