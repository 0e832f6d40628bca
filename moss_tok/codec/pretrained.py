"""Codecs from disk and back."""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moss_tok import checkpoint, storage, tensors
from moss_tok.codec import huggingface
from moss_tok.codec.config import CodecConfig, read_codec_config
from moss_tok.codec.inference import Codec
from moss_tok.codec.model import CodecModel
from moss_tok.errors import check_choice
from moss_tok.nn.compute import ComputeConfig

COMPONENTS = ("all", "encoder", "decoder", "quantizer")


def load(
    path: str | storage.Path, component: str = "all", compute: ComputeConfig | None = None
) -> Codec:
    """Loads a codec.

    Args:
      path: A checkpoint, a training workdir (its newest step), either also in a bucket (gs://), a
        directory in the official Hugging Face layout, or, if huggingface_hub is installed, a Hub
        id ("OpenMOSS-Team/MOSS-Audio-Tokenizer").
      component: "encoder" or "decoder" read only that side, and the quantizer, into memory;
        "quantizer" that alone.
      compute: How it will be computed. The default, float32 at the highest matmul precision, is
        what makes codes repeatable.

    Returns:
      `Codec` with float32 parameters on the default device.

    Raises:
      ValueError: No such checkpoint, or a broken one.
    """
    check_choice("component", component, COMPONENTS)
    compute = compute or ComputeConfig()
    folder = checkpoint.find_checkpoint(path)
    if tensors.is_official(folder):
        config, params = huggingface.read_official(folder, component)
        params = to_device(params)
    else:
        config = read_codec_config(folder / "config.json")
        shapes = param_shapes(config)
        if component != "all":
            shapes = {name: shapes[name] for name in (component, "quantizer")}
        params = checkpoint.read_tree(folder / "params", shapes)
    jax.block_until_ready(params)  # copied, and what they were copied from is free
    _return_memory()
    return Codec(params, config, compute)


def _return_memory() -> None:
    """Gives the system back what reading took: glibc would keep a tenth of a gigabyte of v1's."""
    with contextlib.suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def load_config(path: str | storage.Path) -> CodecConfig:
    """The config of what `load(path)` would load. Raises as `load`."""
    folder = checkpoint.find_checkpoint(path)
    if tensors.is_official(folder):
        return huggingface.read_folder_config(folder)
    return read_codec_config(folder / "config.json")


@functools.lru_cache(maxsize=8)
def boxed_shapes(config: CodecConfig) -> Any:
    """`param_shapes` in boxes that carry logical axis names."""
    wav = jnp.zeros((1, config.num_channels, config.hop_length))
    return jax.eval_shape(CodecModel(config).init, jax.random.key(0), wav)["params"]


def param_shapes(config: CodecConfig) -> dict[str, Any]:
    """ShapeDtypeStructs of all parameters of a codec."""
    return nn.meta.unbox(boxed_shapes(config))


def fingerprint(codec: Codec) -> str:
    """A short hash of a codec's config and parameters: equal codes come from equal ones."""
    config = dataclasses.replace(codec.config, official_json="")
    digest = hashlib.sha256(config.to_json().encode())
    leaves = jax.tree_util.tree_leaves_with_path(codec.params)
    for name, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in leaves):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()[:16]


def to_device(params: dict[str, Any]) -> dict[str, Any]:
    """Replaces the numpy arrays of a tree by jax arrays, one by one: in place, to save memory."""
    for name, value in params.items():
        params[name] = to_device(value) if isinstance(value, dict) else jnp.asarray(value)
    return params


def save(path: str | Path, config: CodecConfig, params: Any) -> None:
    """Writes a codec as a checkpoint; see `checkpoint.save`."""
    checkpoint.save(path, {"config.json": config.to_json()}, {"params": params})
