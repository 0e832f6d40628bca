"""Reads and writes codecs in the official Hugging Face layout.

One table serves both directions: each row gives the name and shape of an official tensor, the
parameter (or the row of a stacked parameter) that holds it, and the conversions between the two
layouts. There are two families of names, "v1" and "v2" (also used by Nano). Inside a head, official
RoPE rotates neighbouring channels and RoPE here rotates the two halves; permuting the rows of q and
k makes them equal.

Source: modeling_moss_audio_tokenizer.py of OpenMOSS-Team/MOSS-Audio-Tokenizer.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moss_tok import tensors
from moss_tok.codec.config import CodecConfig, QuantizerConfig, TransformerConfig
from moss_tok.codec.huggingface_config import (
    identity_sizes,
    read_config,
    with_expressible_layout,
    write_config,
)
from moss_tok.tensors import Tensor

_BLOCK_NAMES = {
    "v1": ("self_attn.in_projs.0", "self_attn.out_projs.0", "linear1", "linear2"),
    "v2": ("self_attn.in_proj", "self_attn.out_proj", "ffn.0", "ffn.2"),
}


def tensor_table(config: CodecConfig, component: str = "all") -> list[Tensor]:
    """Rows of the official tensors of a codec.

    Args:
      config: The codec.
      component: "all", "encoder" or "decoder" (that side and the quantizer), or "quantizer".
    """
    rows: list[Tensor] = []
    for side in ("encoder", "decoder"):
        if component not in ("all", side):
            continue
        for number, module in enumerate(getattr(config, side)):
            if isinstance(module, TransformerConfig):
                path = (side, f"stage_{number}")
                rows += _stage_rows(module, f"{side}.{number}.", path, config.layout)
    rows += _quantizer_rows(config.quantizer)
    return rows


def _same(name, shape, path, row=None) -> Tensor:
    return Tensor(name, shape, path, row, lambda x: x, lambda x: x)


def _linear(name, shape, path, row=None) -> Tensor:
    return Tensor(name, shape, path, row, np.transpose, np.transpose)


def _stage_rows(m: TransformerConfig, prefix, path, layout) -> Iterator[Tensor]:
    d = m.model_dim
    n = m.num_heads
    h = m.head_dim
    qkv_name, out_name, up_name, down_name = _BLOCK_NAMES[layout]
    if m.input_projection:
        kernel = (*path, "input_projection", "kernel")
        yield _linear(f"{prefix}input_proj.weight", (d, m.input_dim), kernel)
    if m.output_projection:
        kernel = (*path, "output_projection", "kernel")
        yield _linear(f"{prefix}output_proj.weight", (m.output_dim, d), kernel)
    layers = (*path, "layers")
    for row in range(m.num_layers):
        block = f"{prefix}transformer.layers.{row}."
        for branch, number in (("attention", 1), ("mlp", 2)):
            norm = (*layers, f"{branch}_norm")
            yield _same(f"{block}norm{number}.weight", (d,), (*norm, "scale"), row)
            yield _same(f"{block}norm{number}.bias", (d,), (*norm, "bias"), row)
            scale = (*layers, f"{branch}_scale")
            yield _same(f"{block}layer_scale_{number}.scale", (d,), scale, row)
        yield Tensor(
            name=f"{block}{qkv_name}.weight",
            shape=(3 * d, d),
            path=(*layers, "attention", "qkv"),
            row=row,
            to_ours=lambda x: _split_qkv(x, n, h),
            to_official=_join_qkv,
        )
        yield Tensor(
            name=f"{block}{out_name}.weight",
            shape=(d, d),
            path=(*layers, "attention", "out"),
            row=row,
            to_ours=lambda x: x.T.reshape(n, h, -1),
            to_official=lambda x: x.reshape(n * h, -1).T,
        )
        yield _linear(f"{block}{up_name}.weight", (m.mlp_dim, d), (*layers, "mlp", "up"), row)
        yield _linear(f"{block}{down_name}.weight", (d, m.mlp_dim), (*layers, "mlp", "down"), row)


def _split_qkv(x: np.ndarray, heads: int, dim: int) -> np.ndarray:
    """[3 * N * H, D] -> [D, 3, N, H]; channels of q and k go from neighbouring pairs to halves."""
    x = x.reshape(3, heads, dim, -1)
    qk = x[:2]
    v = x[2:]
    pairs = qk.reshape(2, heads, dim // 2, 2, -1)
    halves = pairs.swapaxes(2, 3).reshape(qk.shape)
    return np.concatenate([halves, v]).transpose(3, 0, 1, 2)


def _join_qkv(x: np.ndarray) -> np.ndarray:
    """The inverse of `_split_qkv`."""
    _, _, heads, dim = x.shape
    x = x.transpose(1, 2, 3, 0)
    qk = x[:2]
    v = x[2:]
    halves = qk.reshape(2, heads, 2, dim // 2, -1)
    pairs = halves.swapaxes(2, 3).reshape(qk.shape)
    return np.concatenate([pairs, v]).reshape(3 * heads * dim, -1)


def _quantizer_rows(c: QuantizerConfig) -> Iterator[Tensor]:
    if c.input_dim != c.rvq_dim:
        path = ("quantizer", "input_projection")
        yield from _conv("quantizer.input_proj", c.input_dim, c.rvq_dim, path)
    if c.output_dim != c.rvq_dim:
        path = ("quantizer", "output_projection")
        yield from _conv("quantizer.output_proj", c.rvq_dim, c.output_dim, path)
    for row in range(c.num_quantizers):
        prefix = f"quantizer.quantizers.{row}."
        if c.codebook_dim != c.rvq_dim:
            path = ("quantizer", "in_projections")
            yield from _conv(f"{prefix}in_proj", c.rvq_dim, c.codebook_dim, path, row)
            path = ("quantizer", "out_projections")
            yield from _conv(f"{prefix}out_proj", c.codebook_dim, c.rvq_dim, path, row)
        shape = (c.codebook_size, c.codebook_dim)
        yield _same(f"{prefix}codebook.weight", shape, ("quantizer", "codebooks"), row)


def _conv(name, size_in, size_out, path, row=None) -> Iterator[Tensor]:
    """A weight-normalised 1x1 convolution: gain, direction and bias."""
    yield Tensor(
        name=f"{name}.parametrizations.weight.original0",
        shape=(size_out, 1, 1),
        path=(*path, "gain"),
        row=row,
        to_ours=np.ravel,
        to_official=lambda x: x.reshape(-1, 1, 1),
    )
    yield Tensor(
        name=f"{name}.parametrizations.weight.original1",
        shape=(size_out, size_in, 1),
        path=(*path, "direction"),
        row=row,
        to_ours=lambda x: x[..., 0].T,
        to_official=lambda x: x.T[..., None],
    )
    yield _same(f"{name}.bias", (size_out,), (*path, "bias"), row)


def read_folder_config(path: Path, files: Iterable[str] | None = None) -> CodecConfig:
    """Reads the config of an official directory.

    Args:
      path: The directory.
      files: Names of its tensors, if the caller has read them already.

    Raises:
      ValueError: config.json lacks a key, is not supported or is not text.
    """
    try:
        text = (path / "config.json").read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path / 'config.json'}: not a text file") from error
    return read_config(text, files or tensors.tensor_files(path))


def read_official(path: Path, component: str = "all") -> tuple[CodecConfig, dict[str, Any]]:
    """Reads an official directory.

    Args:
      path: Directory with config.json and safetensors.
      component: "all"; "encoder" or "decoder", to read that side and the quantizer only; or
        "quantizer", to read only the quantizer.

    Returns:
      The config, and the parameters as a tree of float32 numpy arrays.

    Raises:
      ValueError: A file or tensor is missing, unknown, misshapen or corrupt; all bad tensors are
        named.
    """
    files = tensors.tensor_files(path)
    config = read_folder_config(path, files)
    for name in identity_sizes(config):
        files.pop(name, None)
    names = {tensor.name for tensor in tensor_table(config, component)}
    return config, tensors.read_tensors(path, files, tensor_table(config), names)


def write_official(path: Path, config: CodecConfig, params: dict[str, Any], dtype: str) -> None:
    """Writes a codec in the official layout into the existing folder `path`.

    Args:
      path: An empty folder.
      config: The codec.
      params: All its parameters, arrays of any float type.
      dtype: Type of the written tensors, "float32", "float16" or "bfloat16".
    """
    if not config.official_json:
        config = with_expressible_layout(config)
    (path / "config.json").write_text(write_config(config, dtype))
    identities = {}
    for name, size in identity_sizes(config).items():
        identities[name] = np.eye(size, dtype=dtype)
    tensors.write_folder(path, tensor_table(config), params, dtype, identities)
