"""One-line descriptions of large objects for `repr`, with sizes instead of values.

The leaves of a pytree may be arrays, tracers, shapes, or placeholders without a shape.
"""

import math
from typing import Any

import jax
import numpy as np


def describe_array(array: Any) -> str:
    """Type and shape of an array: "int32 [2, 8, 16]"."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        return type(array).__name__
    return f"{array.dtype} {list(array.shape)}"


def describe_arrays(name: str, **arrays: Any) -> str:
    """Name, types and shapes: "Encoded(codes: int32 [2, 8, 16], lengths: int32 [2])"."""
    parts = []
    for field, array in arrays.items():
        parts.append(f"{field}: {describe_array(array)}")
    return f"{name}({', '.join(parts)})"


def describe_values(array: Any, max_size: int = 8) -> str:
    """The values of a concrete array of at most `max_size` entries, or else its type and shape."""
    is_known = isinstance(array, np.ndarray)
    if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
        is_known = array.is_fully_addressable and not array.is_deleted()
    if not is_known or array.size > max_size:
        return describe_array(array)
    return str(np.asarray(array).tolist())


def count_parameters(tree: Any) -> str:
    """Total number of entries in a tree of arrays: "1,774,566,400 parameters"."""
    total = 0
    for leaf in _arrays(tree):
        total += math.prod(leaf.shape)
    return f"{total:,} parameters"


def megabytes(tree: Any) -> str:
    """Total memory of a tree of arrays: "12.3 MB"."""
    num_bytes = 0
    for leaf in _arrays(tree):
        num_bytes += math.prod(leaf.shape) * leaf.dtype.itemsize
    return f"{num_bytes / 1e6:.1f} MB"


def count(number: int, noun: str) -> str:
    """A number with its noun: "1 channel", "2 channels"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _arrays(tree: Any) -> list[Any]:
    leaves = jax.tree.leaves(tree)
    return [leaf for leaf in leaves if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]
