"""Keys and values of streams: which frames a chunk holds, and rings of the last frames."""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from moss_tok import summary


class Span(NamedTuple):
    """Which frames of each stream a chunk holds: the first is `start` [B], `count` [B] are real."""

    start: jax.Array
    count: jax.Array


@flax.struct.dataclass
class Cache:
    """Keys and values of the last R = window - 1 frames of streams, for all layers of a stage.

    Both are [L, B, N, R, H], rings: frame t lies at t mod R.
    """

    keys: jax.Array
    values: jax.Array

    def __repr__(self) -> str:
        return summary.describe_arrays("Cache", keys=self.keys, values=self.values)

    @property
    def num_frames(self) -> int:
        """R."""
        return self.keys.shape[-2]

    def layer(self, index: jax.Array) -> "Cache":
        """One layer: [B, N, R, H]."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), self)

    def replace_layer(self, index: jax.Array, layer: "Cache") -> "Cache":
        """With another layer [B, N, R, H] at `index`."""
        put = jax.lax.dynamic_update_index_in_dim
        return jax.tree.map(lambda x, new: put(x, new, index, 0), self, layer)

    def fresh(self, span: Span, k: jax.Array, v: jax.Array) -> "Cache":
        """What is kept of a chunk's k, v [B, N, T, H] for `write`; this is one layer.

        The chunk itself, or, if it has more than R frames, the layer as it is next.
        """
        num_frames, size = k.shape[2], self.num_frames
        if num_frames <= size:
            return Cache(k, v)
        first = span.count[:, None] - size  # of the last R frames, in the chunk
        i = first + (jnp.arange(size) - span.start[:, None] - first) % max(size, 1)
        i = i[:, None, :, None]  # [B, 1, R, 1]: what comes to each place, below 0: nothing

        def put(ring, new):
            new = jnp.take_along_axis(new, jnp.maximum(i, 0), axis=2)
            return jnp.where(i >= 0, new.astype(ring.dtype), ring)

        return Cache(put(self.keys, k), put(self.values, v))

    def write(self, span: Span, fresh: "Cache") -> "Cache":
        """Puts in what `fresh` kept of a chunk of at most R frames, of all layers."""
        batch, size, num_frames = self.keys.shape[1], self.num_frames, fresh.num_frames
        i = jnp.arange(num_frames)
        place = (span.start[:, None] + i) % size  # [B, T]
        place = jnp.where(i < span.count[:, None], place, size)  # nowhere

        def put(ring, new):
            rows = ring.at[:, jnp.arange(batch)[:, None], :, place]
            return rows.set(jnp.moveaxis(new, (1, 3), (0, 1)).astype(ring.dtype), mode="drop")

        return Cache(put(self.keys, fresh.keys), put(self.values, fresh.values))
