"""Microbatches: parts of a batch that are computed one after another, to save memory."""

from collections.abc import Callable
from typing import Any

import jax


def split(batch: Any, num_parts: int) -> Any:
    """[B, ...] to [num_parts, B / num_parts, ...]; each part takes every num_parts-th item."""

    def split_array(x):
        interleaved = x.reshape(-1, num_parts, *x.shape[1:])
        return interleaved.swapaxes(0, 1)

    return jax.tree.map(split_array, batch)


def join(parts: Any) -> Any:
    """The inverse of `split`: the batch in its original order."""

    def join_array(x):
        interleaved = x.swapaxes(0, 1)
        return interleaved.reshape(-1, *x.shape[2:])

    return jax.tree.map(join_array, parts)


def apply_to_each(function: Callable[[Any], Any], parts: Any) -> Any:
    """Applies `function` to each part.

    Several parts are computed one after another, and again in the backward pass, so that memory
    holds the activations of one part only.
    """
    if _num_parts(parts) == 1:
        result = function(_only_part(parts))
        return _as_parts(result)
    return jax.lax.map(jax.checkpoint(function), parts)


def scan(function: Callable[[Any, Any], Any], carry: Any, parts: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` over parts; a single part is computed without a loop.

    In the body of a loop, XLA on CPUs runs convolutions on one core with its slowest algorithm.
    """
    if _num_parts(parts) > 1:
        return jax.lax.scan(function, carry, parts)
    carry, result = function(carry, _only_part(parts))
    return carry, _as_parts(result)


def _num_parts(parts: Any) -> int:
    return jax.tree.leaves(parts)[0].shape[0]


def _only_part(parts: Any) -> Any:
    """[1, ...] to [...]."""
    return jax.tree.map(lambda x: x[0], parts)


def _as_parts(part: Any) -> Any:
    """[...] to [1, ...]."""
    return jax.tree.map(lambda x: x[None], part)
