"""Microbatches: a batch in parts that are computed one after the other, to save memory."""

from collections.abc import Callable
from typing import Any

import jax


def split(batch: Any, num_parts: int) -> Any:
    """[B, ...] to [num_parts, B / num_parts, ...], each part spread over the whole batch."""

    def split_array(x):
        return x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split_array, batch)


def join(parts: Any) -> Any:
    """The inverse of `split`: the batch in its order, however it was split."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


def apply_to_each(function: Callable[[Any], Any], parts: Any) -> Any:
    """Applies `function` to each part.

    Several are computed one after the other, and again in the backward pass, so that only the
    activations of one are held.
    """
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        result = function(jax.tree.map(lambda x: x[0], parts))
        return jax.tree.map(lambda x: x[None], result)
    return jax.lax.map(jax.checkpoint(function), parts)


def scan(function: Callable[[Any, Any], Any], carry: Any, parts: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` over parts; a single one without a loop.

    XLA on CPUs runs the convolutions of a loop's body on one core by its slowest path.
    """
    if jax.tree.leaves(parts)[0].shape[0] > 1:
        return jax.lax.scan(function, carry, parts)
    carry, result = function(carry, jax.tree.map(lambda x: x[0], parts))
    return carry, jax.tree.map(lambda x: x[None], result)
