"""Masks of the valid entries of batches, and of the quantizers in use."""

import jax
import jax.numpy as jnp
import numpy as np


def zero_past(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """Sets x [B, *, size] to zero past the lengths [B]; NaN there is replaced, too."""
    is_valid = valid_mask(x.shape[-1], lengths)
    return jnp.where(is_valid[:, None], x, 0)


def valid_mask(size: int, lengths: jax.Array) -> jax.Array:
    """Bool [B, size], true before the lengths [B]."""
    return jnp.arange(size) < lengths[:, None]


def prefix_mask(codes: jax.Array | np.ndarray, num_quantizers: int | jax.Array) -> jax.Array:
    """Bool [B, q] for codes [B, q, T], true for the first `num_quantizers`, which may be traced."""
    is_used = jnp.arange(codes.shape[1]) < num_quantizers
    return jnp.broadcast_to(is_used, codes.shape[:2])
