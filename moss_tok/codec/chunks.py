"""Long inputs chunk by chunk in one program: a scan that carries the caches of a codec."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moss_tok.codec.masks import zero_past
from moss_tok.codec.model import Caches
from moss_tok.nn.cache import Span


def scan_chunks(
    caches: Caches,
    step: Callable[[Caches, jax.Array, Span], tuple[jax.Array, Caches]],
    x: jax.Array,
    lengths: jax.Array,
    out: jax.Array,
    units: tuple[int, int],
    frames_per_chunk: int,
) -> jax.Array:
    """Applies `step` to the chunks of x [B, *, S] in order, and writes the results into `out`.

    Chunks are slices of `x` and of `out`, so that no copy of either is made. The first chunk may be
    partial, so that all later ones are full: only its first frames count, and the second chunk
    overwrites the rest of its result.

    Args:
      caches: Empty caches of one side of a codec, for B items.
      step: (caches, chunk of x, span) -> (chunk of out, caches).
      x: Input of all frames.
      lengths: [B] valid entries of x along its last axis.
      out: Array of zeros to write into.
      units: Entries of one code frame along the last axis of x and of out.
      frames_per_chunk: Code frames per chunk.
    """
    in_unit, out_unit = units
    batch = x.shape[0]
    num_frames = out.shape[-1] // out_unit
    num_chunks = -(-num_frames // frames_per_chunk)
    first_count = num_frames - (num_chunks - 1) * frames_per_chunk

    def scan_step(carry: tuple[Any, jax.Array], index: jax.Array) -> tuple[Any, None]:
        caches, out = carry
        start = jnp.maximum(0, first_count + (index - 1) * frames_per_chunk)
        count = jnp.where(index == 0, first_count, frames_per_chunk)
        chunk = _slice(x, start * in_unit, frames_per_chunk * in_unit)
        chunk = zero_past(chunk, lengths - start * in_unit)
        span = Span(
            start=jnp.broadcast_to(start, (batch,)),
            count=jnp.broadcast_to(count, (batch,)),
        )
        result, caches = step(caches, chunk, span)
        out = jax.lax.dynamic_update_slice_in_dim(out, result, start * out_unit, axis=2)
        return (caches, out), None

    (_, out), _ = jax.lax.scan(scan_step, (caches, out), jnp.arange(num_chunks))
    return out


def _slice(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """x[..., start : start + size]; entries beyond the end of x are arbitrary."""
    # Near the end, dynamic_slice moves the start back by `excess`; the roll undoes this.
    excess = jnp.maximum(0, start + size - x.shape[-1])
    part = jax.lax.dynamic_slice_in_dim(x, start, size, axis=-1)
    return jnp.roll(part, -excess, axis=-1)


def pad(x: jax.Array, multiple: int) -> jax.Array:
    """Pads the last axis with zeros to a multiple of `multiple`."""
    size = x.shape[-1]
    # Written as a product, so that jax.export knows that symbolic sizes are multiples.
    padded_size = -(-size // multiple) * multiple
    return jnp.pad(x, ((0, 0), (0, 0), (0, padded_size - size)))
