"""One line on big objects, for `repr`: what is in them is counted, not printed.

The leaves may be anything that JAX puts into a pytree: arrays, tracers, shapes, or placeholders
without a shape.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from moss_tok.config import PRESETS, CodecConfig, PatchConfig, preset


def describe_array(array: Any) -> str:
    """Type and shape of an array: "int32 [2, 8, 16]"."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        return type(array).__name__
    return f"{array.dtype} {list(array.shape)}"


def describe_arrays(name: str, **arrays: Any) -> str:
    """What holds `arrays`: "Encoded(codes: int32 [2, 8, 16], lengths: int32 [2])"."""
    parts = [f"{field}: {describe_array(array)}" for field, array in arrays.items()]
    return f"{name}({', '.join(parts)})"


def describe_values(array: Any, most: int = 8) -> str:
    """The values of an array of at most so many, where they are known; else type and shape."""
    is_known = isinstance(array, np.ndarray)
    if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
        is_known = array.is_fully_addressable and not array.is_deleted()
    if not is_known or array.size > most:
        return describe_array(array)
    return str(np.asarray(array).tolist())


def describe_codec(config: Any) -> str:
    """A codec's preset, or the stages of its encoder, and its rates."""
    if not isinstance(config, CodecConfig):  # JAX makes pytrees with anything in their place
        return type(config).__name__
    parts = [
        _preset_name(config) or _stages(config),
        f"{config.sample_rate} Hz",
        count(config.num_channels, "channel"),
        f"{config.frame_rate:g} frames/s",
        f"{count(config.quantizer.num_quantizers, 'quantizer')} of {config.quantizer.codebook_size}"
        " codes",
    ]
    return ", ".join(parts)


def count_parameters(tree: Any) -> str:
    """The numbers in a tree of arrays: "1,774,566,400 parameters"."""
    total = sum(math.prod(leaf.shape) for leaf in _arrays(tree))
    return f"{total:,} parameters"


def megabytes(tree: Any) -> str:
    """Memory of a tree of arrays: "12.3 MB"."""
    num_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in _arrays(tree))
    return f"{num_bytes / 1e6:.1f} MB"


def count(number: int, noun: str) -> str:
    """A number and what it counts: 1 channel, 2 channels."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _arrays(tree: Any) -> list[Any]:
    leaves = jax.tree.leaves(tree)
    return [leaf for leaf in leaves if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]


def _preset_name(config: CodecConfig) -> str:
    """The preset that `config` equals, or ""."""
    for name in PRESETS:
        wanted = preset(name)
        if dataclasses.replace(config, layout=wanted.layout, official_json="") == wanted:
            return name
    return ""


def _stages(config: CodecConfig) -> str:
    parts = []
    for module in config.encoder:
        if isinstance(module, PatchConfig):
            parts.append(f"patch {module.patch_size}")
        else:
            parts.append(f"{count(module.num_layers, 'layer')} of {module.model_dim}")
    return " - ".join(parts)
