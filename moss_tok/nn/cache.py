"""Caches of the keys and values of streams, as ring buffers, and the frames that a chunk holds."""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from moss_tok import summary


class Span(NamedTuple):
    """The frames of each stream in a chunk.

    Attributes:
      start: [B] integers, index of the chunk's first frame in each stream.
      count: [B] integers, valid frames of each stream; the other frames of the chunk are padding.
    """

    start: jax.Array
    count: jax.Array


def frame_positions(num_frames: int, span: Span | None) -> jax.Array:
    """Positions of the frames of a chunk in their streams.

    Args:
      num_frames: T.
      span: The frames; None: the streams start with the chunk.

    Returns:
      [T] without a span, or [B, 1, T], for the heads of each stream.
    """
    positions = jnp.arange(num_frames)
    if span is None:
        return positions
    return span.start[:, None, None] + positions


@flax.struct.dataclass
class Cache:
    """Keys and values of the last R = window - 1 frames of streams, for all layers of a stage.

    Both are ring buffers [L, B, N, R, H]: frame t is in slot t mod R.
    """

    keys: jax.Array
    values: jax.Array

    def __repr__(self) -> str:
        return summary.describe_arrays("Cache", keys=self.keys, values=self.values)

    @property
    def num_frames(self) -> int:
        """R, the frames that the cache holds per stream."""
        return self.keys.shape[-2]

    def layer(self, index: jax.Array) -> "Cache":
        """The layer at `index`: [B, N, R, H]."""

        def take(ring):
            return jax.lax.dynamic_index_in_dim(ring, index, keepdims=False)

        return jax.tree.map(take, self)

    def replace_layer(self, index: jax.Array, layer: "Cache") -> "Cache":
        """A cache with the layer at `index` replaced by `layer` [B, N, R, H]."""

        def put(rings, ring):
            return jax.lax.dynamic_update_index_in_dim(rings, ring, index, axis=0)

        return jax.tree.map(put, self, layer)

    def fresh(self, span: Span, k: jax.Array, v: jax.Array) -> "Cache":
        """The keys and values of a chunk that must go into this layer of a cache.

        Args:
          span: The chunk's frames.
          k: Keys of the chunk [B, N, T, H].
          v: Values of the chunk [B, N, T, H].

        Returns:
          The chunk's keys and values, for `write`; or, if the chunk has more than R frames, the
          complete next state of this layer, for `replace_layer`.
        """
        num_frames = k.shape[2]
        size = self.num_frames
        if num_frames <= size:
            return Cache(k, v)
        first = span.count[:, None] - size  # index in the chunk of the first of the last R frames
        source = first + (jnp.arange(size) - span.start[:, None] - first) % max(size, 1)
        # Index in the chunk of the frame for each slot; below 0 the slot keeps its frame.
        source = source[:, None, :, None]  # [B, 1, R, 1]

        def put(ring, new):
            new = jnp.take_along_axis(new, jnp.maximum(source, 0), axis=2)
            return jnp.where(source >= 0, new.astype(ring.dtype), ring)

        return Cache(put(self.keys, k), put(self.values, v))

    def write(self, span: Span, fresh: "Cache") -> "Cache":
        """Writes the results of `fresh`, stacked over all layers, for a chunk of at most R frames.

        Args:
          span: The chunk's frames.
          fresh: Keys and values of the chunk [L, B, N, T, H].

        Returns:
          The next cache.
        """
        batch = self.keys.shape[1]
        size = self.num_frames
        i = jnp.arange(fresh.num_frames)
        slot = (span.start[:, None] + i) % size  # [B, T]
        slot = jnp.where(i < span.count[:, None], slot, size)  # padding: out of bounds, dropped

        def put(ring, new):
            rows = ring.at[:, jnp.arange(batch)[:, None], :, slot]
            new = jnp.moveaxis(new, (1, 3), (0, 1))
            return rows.set(new.astype(ring.dtype), mode="drop")

        return Cache(put(self.keys, fresh.keys), put(self.values, fresh.values))
