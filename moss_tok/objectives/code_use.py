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

    An item uses all quantizers, or with probability `share` only the first n, where n is uniform in
    1..`largest` (default: Q). The draw of an item depends only on its position in the global batch,
    not on how the batch is split.
    """
    largest = largest or num_quantizers

    def draw(position):
        number_key, share_key = jax.random.split(jax.random.fold_in(key, position))
        number = jax.random.randint(number_key, (), 1, largest + 1)
        is_dropped = jax.random.uniform(share_key) < share
        num_used = jnp.where(is_dropped, number, num_quantizers)
        return jnp.arange(num_quantizers) < num_used

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

    def count(codes, weights):
        return jnp.bincount(codes, weights=weights, length=codebook_size)

    weights = by_quantizer(used.astype(jnp.float32))
    return jax.vmap(count)(by_quantizer(codes), weights)


def by_quantizer(x: jax.Array) -> jax.Array:
    """[B, Q, T, ...] to [Q, N, ...]: for each quantizer, all its vectors in the batch."""
    batch, num_quantizers, num_frames, *sizes = x.shape
    return x.swapaxes(0, 1).reshape(num_quantizers, batch * num_frames, *sizes)


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
    rank = jnp.cumsum(used, axis=-1)  # of each vector among the used ones, from 1
    num_used = rank[:, -1:]
    drawn = (jax.random.uniform(key, counts.shape) * num_used).astype(jnp.int32)
    search = functools.partial(jnp.searchsorted, side="right")
    indices = jax.vmap(search)(rank, drawn)  # [Q, K]
    replacements = jnp.take_along_axis(projected, indices[..., None], axis=1, mode="clip")
    expected = counts.sum(-1, keepdims=True) / counts.shape[1]
    is_dead = (counts < _DEAD_SHARE * expected) & (num_used > 0)

    def replace(book):
        return jnp.where(is_dead[..., None], replacements, book)

    return jax.tree.map(replace, books), jnp.where(is_dead, expected, counts)


def summary(counts: jax.Array) -> dict[str, Any]:
    """Perplexity and share of recently used codes per quantizer; the share of dead codes."""
    counts = np.asarray(counts)
    shares = counts / np.maximum(counts.sum(-1, keepdims=True), 1e-9)
    entropy = -np.sum(shares * np.log(shares + 1e-20), -1)  # nats
    usage = (counts > _USED).mean(-1)
    is_dead = shares * counts.shape[1] < _DEAD_SHARE
    return {
        "codebook_perplexity": _rounded(np.exp(entropy), 2),
        "codebook_usage": _rounded(usage, 4),
        "dead_codes": float(is_dead.mean()),
    }


def _rounded(values: np.ndarray, num_digits: int) -> list[float]:
    return [round(float(value), num_digits) for value in values]
