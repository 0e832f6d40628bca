"""Quantizers in training: dropout, counts of codes, and replacement of unused codes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moss_tok.codec.config import CodecConfig, QuantizerConfig
from moss_tok.training import microbatches

COUNTED_STEPS = 50  # time constant of the counts of codes
_COUNT_DECAY = 1 - 1 / COUNTED_STEPS
_DEAD_SHARE = 0.1  # codes used less than this share of uniform use are dead
_USED = 0.36  # a single use, 50 steps ago, has decayed to this


def zero_counts(quantizer: QuantizerConfig) -> jax.Array:
    """Initial counts [Q, K]."""
    return jnp.zeros((quantizer.num_quantizers, quantizer.codebook_size))


def draw_dropout(
    num_quantizers: int,
    share: float,
    key: jax.Array,
    positions: jax.Array,
    largest: int | None = None,
) -> jax.Array:
    """Which quantizers each item uses: bool [B, Q].

    An item uses all quantizers, or with probability `share` only the first n, n uniform in
    1..`largest` (default: Q).
    The draw of an item depends only on its position in the global batch, not on how that is split.
    """

    def draw(position):
        number_key, share_key = jax.random.split(jax.random.fold_in(key, position))
        number = jax.random.randint(number_key, (), 1, (largest or num_quantizers) + 1)
        dropped = jax.random.uniform(share_key) < share
        return jnp.arange(num_quantizers) < jnp.where(dropped, number, num_quantizers)

    return jax.vmap(draw)(positions)


def use_mask(codec: CodecConfig, codes: jax.Array, in_use: jax.Array, length: jax.Array):
    """Bool [B, Q, T]: codes that are not padding, of quantizers that the item uses."""
    valid = jnp.arange(codes.shape[-1]) < codec.num_frames(length)[:, None]  # [B, T]
    return in_use[..., None] & valid[:, None]


def join_parts(codes: jax.Array, projected: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Microbatches [M, B, Q, T] and [M, Q, B, T, c] to [B, Q, T] and [B, Q, T, c]."""
    return microbatches.join((codes, jnp.swapaxes(projected, 1, 2)))


def add_counts(counts: jax.Array, codes: jax.Array, used: jax.Array) -> jax.Array:
    """Decayed counts [Q, K] plus the counts of codes [B, Q, T] where `used`."""
    return _COUNT_DECAY * counts + histogram(codes, used, counts.shape[1])


def histogram(codes: jax.Array, used: jax.Array, codebook_size: int) -> jax.Array:
    """Counts [Q, K] of codes [B, Q, T] where `used`."""
    count = functools.partial(jnp.bincount, length=codebook_size)
    weights = by_quantizer(used.astype(jnp.float32))
    return jax.vmap(lambda c, u: count(c, weights=u))(by_quantizer(codes), weights)


def by_quantizer(x: jax.Array) -> jax.Array:
    """[B, Q, T, ...] to [Q, N, ...]: for each quantizer, all its vectors in the batch."""
    return x.swapaxes(0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2], *x.shape[3:])


def reseed(
    books: dict[str, jax.Array],
    counts: jax.Array,
    projected: jax.Array,
    used: jax.Array,
    key: jax.Array,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Replaces codes that are hardly used by random vectors of this batch.

    Args:
      books: Codebooks [Q, K, c] by name; all get the same replacements.
      counts: Decayed counts of codes, [Q, K].
      projected: Vectors before quantization, [Q, N, c].
      used: bool [Q, N], vectors that are not padding, of items that use the quantizer.
      key: For the choice of vectors.

    Returns:
      The codebooks and the counts.
    """
    rank = jnp.cumsum(used, axis=-1)
    number = rank[:, -1:]
    draw = (jax.random.uniform(key, counts.shape) * number).astype(jnp.int32)
    chosen = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(rank, draw)
    fresh = jnp.take_along_axis(projected, chosen[..., None], axis=1, mode="clip")
    expected = counts.sum(-1, keepdims=True) / counts.shape[1]
    dead = (counts < _DEAD_SHARE * expected) & (number > 0)
    books = jax.tree.map(lambda book: jnp.where(dead[..., None], fresh, book), books)
    return books, jnp.where(dead, expected, counts)


def summary(counts: jax.Array) -> dict[str, Any]:
    """Perplexity and share of recently used codes per quantizer; the share of dead codes."""
    counts = np.asarray(counts)
    share = counts / np.maximum(counts.sum(-1, keepdims=True), 1e-9)
    perplexity = np.exp(-np.sum(share * np.log(share + 1e-20), -1))
    usage = (counts > _USED).mean(-1)
    return {
        "codebook_perplexity": [round(float(x), 2) for x in perplexity],
        "codebook_usage": [round(float(x), 4) for x in usage],
        "dead_codes": float((share * counts.shape[1] < _DEAD_SHARE).mean()),
    }
