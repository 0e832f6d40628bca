"""Loads codecs from checkpoints, workdirs and the official layout, and saves them."""

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
    path: str | storage.Path | None = None,
    component: str = "all",
    compute: ComputeConfig | None = None,
) -> Codec:
    """Loads the codec that comes with the package, or one from disk, a bucket or the Hub.

        codec = moss_tok.load()
        codes, lengths = moss_tok.encode(codec, wav)  # wav [B, C, S]

    Args:
      path: One of: a checkpoint; a training workdir, of which the newest step is loaded (both may
        be in a bucket, gs://...); a directory in the official Hugging Face layout; or, if
        huggingface_hub is installed, a Hub id such as "OpenMOSS-Team/MOSS-Audio-Tokenizer".
        Default: the small codec that comes with the package.
      component: "all"; "encoder" or "decoder", to read only that side and the quantizer into
        memory; or "quantizer", to read only the quantizer.
      compute: Types, precision and attention of the computation. The default, float32 at the
        highest matmul precision, makes codes reproducible.

    Returns:
      `Codec` with float32 parameters on the default device.

    Raises:
      ValueError: There is no checkpoint at `path`, it is incomplete, damaged or not supported, or
        component is unknown.
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
            shapes = {component: shapes[component], "quantizer": shapes["quantizer"]}
        params = checkpoint.read_tree(folder / "params", shapes)
    jax.block_until_ready(params)  # afterwards, the copies made while reading are free
    _return_memory()
    return Codec(params, config, compute)


def _return_memory() -> None:
    """Returns freed memory to the system; after reading v1, glibc would keep 0.1 GB of it."""
    with contextlib.suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def load_config(path: str | storage.Path | None = None) -> CodecConfig:
    """The config of the codec that `load(path)` loads. Raises the same errors."""
    folder = checkpoint.find_checkpoint(path)
    if tensors.is_official(folder):
        return huggingface.read_folder_config(folder)
    return read_codec_config(folder / "config.json")


@functools.lru_cache(maxsize=8)
def boxed_shapes(config: CodecConfig) -> Any:
    """`param_shapes` in Flax boxes that carry logical axis names."""
    wav = jnp.zeros((1, config.num_channels, config.hop_length))
    return jax.eval_shape(CodecModel(config).init, jax.random.key(0), wav)["params"]


def param_shapes(config: CodecConfig) -> dict[str, Any]:
    """ShapeDtypeStructs of all parameters of a codec, as a tree."""
    return nn.meta.unbox(boxed_shapes(config))


def fingerprint(codec: Codec) -> str:
    """A short hash of a codec's config and parameters; codecs with equal ones give equal codes."""
    return _digest(codec.config, codec.params)


def quantizer_fingerprint(codec: Codec) -> str:
    """A hash of config and quantizer; codecs with the same hash can decode each other's codes.

    It does not depend on the loaded component, on the official layout, or on fine-tuning of the
    decoder.
    """
    return _quantizer_digest(codec.config, _ByIdentity(codec.params["quantizer"]))


class _ByIdentity:
    """A tree as a key of a cache; it equals only itself."""

    def __init__(self, tree: Any):
        self.tree = tree

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self.tree is other.tree

    def __hash__(self) -> int:
        return id(self.tree)


@functools.lru_cache(maxsize=1)  # commands need it for each file
def _quantizer_digest(config: CodecConfig, quantizer: _ByIdentity) -> str:
    return _digest(dataclasses.replace(config, layout="v1"), quantizer.tree)


def _digest(config: CodecConfig, params: Any) -> str:
    config = dataclasses.replace(config, official_json="")
    digest = hashlib.sha256(config.to_json().encode())
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaves[jax.tree_util.keystr(path)] = leaf
    for name in sorted(leaves):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(leaves[name]).data)
    return digest.hexdigest()[:16]


def to_device(params: dict[str, Any]) -> dict[str, Any]:
    """Replaces the numpy arrays of a tree by jax arrays one by one, in place to save memory."""
    for name, value in params.items():
        if isinstance(value, dict):
            to_device(value)
        else:
            params[name] = jnp.asarray(value)
    return params


def save(
    path: str | Path,
    config: CodecConfig,
    params: Any,
    files: dict[str, str] | None = None,
) -> None:
    """Writes a codec, and other text files by name, as a new checkpoint; see `checkpoint.save`."""
    texts = {"config.json": config.to_json()} | (files or {})
    checkpoint.save(path, texts, {"params": params})
