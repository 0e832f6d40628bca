"""The official Hugging Face layout: one table of its tensors, and its files.

The table serves both directions: each row says how an official tensor is called and shaped, which
parameter (or row of a stacked one) it is, and how the two layouts differ. Names come in two
families, "v1" and "v2" (Nano too). Inside a head, official RoPE rotates neighbouring channels; ours
rotates the halves, which is the same with the rows of q and k permuted.

Source: modeling_moss_audio_tokenizer.py of OpenMOSS-Team/MOSS-Audio-Tokenizer.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors looks up by name
import numpy as np
import safetensors
import safetensors.numpy

from moss_tok import storage
from moss_tok.codec.huggingface_config import read_config, write_config
from moss_tok.config import CodecConfig, QuantizerConfig, TransformerConfig, read_json_object

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9


# ------------------------------------------------------------------------------------ the table


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One official tensor and the parameter it is.

    Attributes:
      name: Official name.
      shape: Official shape.
      path: Where the parameter is in our tree.
      row: Row of a parameter stacked over layers or quantizers; None for the whole one.
      to_ours: Official array -> our layout.
      to_official: The inverse.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    row: int | None
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_official: Callable[[np.ndarray], np.ndarray]


_BLOCK_NAMES = {
    "v1": ("self_attn.in_projs.0", "self_attn.out_projs.0", "linear1", "linear2"),
    "v2": ("self_attn.in_proj", "self_attn.out_proj", "ffn.0", "ffn.2"),
}


def tensor_table(config: CodecConfig, component: str = "all") -> list[Tensor]:
    """All official tensors of a codec, or of one side ("encoder", "decoder") and the quantizer."""
    rows: list[Tensor] = []
    for side in ("encoder", "decoder"):
        if component not in ("all", side):
            continue
        for i, module in enumerate(getattr(config, side)):
            if isinstance(module, TransformerConfig):
                rows += _stage_rows(module, f"{side}.{i}.", (side, f"stage_{i}"), config.layout)
    return rows + list(_quantizer_rows(config.quantizer))


def _same(name, shape, path, row=None) -> Tensor:
    return Tensor(name, shape, path, row, lambda x: x, lambda x: x)


def _linear(name, shape, path, row=None) -> Tensor:
    return Tensor(name, shape, path, row, np.transpose, np.transpose)


def _stage_rows(m: TransformerConfig, prefix, path, layout) -> Iterator[Tensor]:
    d, n, h = m.model_dim, m.num_heads, m.head_dim
    qkv_name, out_name, up_name, down_name = _BLOCK_NAMES[layout]
    if m.input_projection:
        where = (*path, "input_projection", "kernel")
        yield _linear(f"{prefix}input_proj.weight", (d, m.input_dim), where)
    if m.output_projection:
        where = (*path, "output_projection", "kernel")
        yield _linear(f"{prefix}output_proj.weight", (m.output_dim, d), where)
    for row in range(m.num_layers):
        block, where = f"{prefix}transformer.layers.{row}.", (*path, "layers")
        for ours, norm, scale in (("attention", "norm1", "1"), ("mlp", "norm2", "2")):
            yield _same(f"{block}{norm}.weight", (d,), (*where, f"{ours}_norm", "scale"), row)
            yield _same(f"{block}{norm}.bias", (d,), (*where, f"{ours}_norm", "bias"), row)
            yield _same(f"{block}layer_scale_{scale}.scale", (d,), (*where, f"{ours}_scale"), row)
        yield Tensor(
            f"{block}{qkv_name}.weight", (3 * d, d), (*where, "attention", "qkv"), row,
            lambda x: _split_qkv(x, n, h), _join_qkv,
        )  # fmt: skip
        yield Tensor(
            f"{block}{out_name}.weight", (d, d), (*where, "attention", "out"), row,
            lambda x: x.T.reshape(n, h, -1), lambda x: x.reshape(n * h, -1).T,
        )  # fmt: skip
        yield _linear(f"{block}{up_name}.weight", (m.mlp_dim, d), (*where, "mlp", "up"), row)
        yield _linear(f"{block}{down_name}.weight", (d, m.mlp_dim), (*where, "mlp", "down"), row)


def _split_qkv(x: np.ndarray, heads: int, dim: int) -> np.ndarray:
    """[3 * N * H, D] -> [D, 3, N, H], q and k from neighbouring pairs to halves."""
    x = x.reshape(3, heads, dim, -1)
    pairs = x[:2].reshape(2, heads, dim // 2, 2, -1).swapaxes(2, 3).reshape(x[:2].shape)
    return np.concatenate([pairs, x[2:]]).transpose(3, 0, 1, 2)


def _join_qkv(x: np.ndarray) -> np.ndarray:
    """The inverse of `_split_qkv`."""
    _, _, heads, dim = x.shape
    x = x.transpose(1, 2, 3, 0)
    pairs = x[:2].reshape(2, heads, 2, dim // 2, -1).swapaxes(2, 3).reshape(x[:2].shape)
    return np.concatenate([pairs, x[2:]]).reshape(3 * heads * dim, -1)


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
        f"{name}.parametrizations.weight.original0", (size_out, 1, 1), (*path, "gain"), row,
        np.ravel, lambda x: x.reshape(-1, 1, 1),
    )  # fmt: skip
    yield Tensor(
        f"{name}.parametrizations.weight.original1", (size_out, size_in, 1),
        (*path, "direction"), row, lambda x: x[..., 0].T, lambda x: x.T[..., None],
    )  # fmt: skip
    yield _same(f"{name}.bias", (size_out,), (*path, "bias"), row)


# ------------------------------------------------------------------------------------ files


def is_official(path: Path) -> bool:
    """Whether `path` holds official weights: one safetensors file or an index of several."""
    return (path / WEIGHTS_NAME).exists() or (path / INDEX_NAME).exists()


def tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it."""
    if (path / INDEX_NAME).exists():
        index = read_json_object(path / INDEX_NAME)
        weight_map = index.get("weight_map")
        names = weight_map.values() if isinstance(weight_map, dict) else [None]
        if not all(isinstance(name, str) and Path(name).name for name in names):
            raise ValueError(f"{path / INDEX_NAME}: weight_map must give a file per tensor")
        files = {name: path / Path(file).name for name, file in weight_map.items()}
        for file in sorted(set(files.values())):
            found = set(_names(file))
            if gone := sorted(n for n, f in files.items() if f == file and n not in found):
                raise ValueError(f"{file}: lacks {len(gone)} tensors of the index: {gone[0]} ...")
            if more := sorted(n for n in found if files.get(n) != file):
                raise ValueError(f"{file}: {more[0]} is not in the index, or of another file")
        return files
    return dict.fromkeys(_names(path / WEIGHTS_NAME), path / WEIGHTS_NAME)


def _names(file: Path) -> list[str]:
    with _open(file) as tensors:
        return list(tensors.keys())


def _open(file: Path):
    try:
        return safetensors.safe_open(file, framework="numpy")
    except safetensors.SafetensorError as error:
        reason = storage.pointer_hint(file) or f"corrupt safetensors file: {error}"
        raise ValueError(f"{file}: {reason}") from error
    except FileNotFoundError as error:
        reason = "a link to a file that is not there" if file.is_symlink() else "no such file"
        raise ValueError(f"{file}: {reason}") from error
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error


def read_folder_config(path: Path, files: Iterable[str] | None = None) -> CodecConfig:
    """The config of an official directory, whose tensors are called `files`."""
    try:
        return read_config((path / "config.json").read_text(), files or tensor_files(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path / 'config.json'}: no text file") from error


def read_official(path: Path, component: str = "all") -> tuple[CodecConfig, dict[str, Any]]:
    """Reads an official directory.

    Args:
      path: Directory with config.json and safetensors.
      component: "all", "encoder", "decoder" or "quantizer": a side comes with the quantizer, and
        only its tensors are read.

    Returns:
      The config, and the parameters as a tree of float32 numpy arrays.

    Raises:
      ValueError: Anything missing, unknown, misshapen or corrupt; tensors are named, all of them.
    """
    files = tensor_files(path)
    config = read_folder_config(path, files)
    wanted = {t.name for t in tensor_table(config, component)}
    return config, read_tensors(path, files, tensor_table(config), wanted)


def read_tensors(
    path: Path, files: dict[str, Path], table: Iterable[Tensor], wanted: set[str]
) -> dict[str, Any]:
    """Reads those tensors of a table that are `wanted`, into a tree of float32 numpy arrays.

    Args:
      path: What messages name.
      files: Tensor name -> file, all that there are.
      table: All that there should be.
      wanted: Names.

    Raises:
      ValueError: As `read_official`.
    """
    table = {t.name: t for t in table}
    problems = [f"missing {name}" for name in table.keys() - files.keys()]
    problems += [f"unknown {name}" for name in files.keys() - table.keys()]
    params: dict[str, Any] = {}
    stacked = _stacked_rows(table.values())
    for file, names in _batches([n for n in table if n in files], files):
        with _open(file) as tensors:
            for name in names:
                tensor, found = table[name], tensors.get_slice(name)
                shape, dtype = tuple(found.get_shape()), found.get_dtype()
                if dtype not in _DTYPES:
                    problems.append(f"{name} has type {dtype}, not one of {', '.join(_DTYPES)}")
                elif shape != tensor.shape:
                    problems.append(f"{name} has shape {shape}, not {tensor.shape}")
                elif name in wanted and not problems:
                    array = tensor.to_ours(tensors.get_tensor(name).astype(np.float32))
                    _put(params, tensor, array, stacked)
    if problems:
        raise ValueError(f"{path}: {len(problems)} bad tensors: {'; '.join(sorted(problems))}")
    return params


def _batches(names: list[str], files: dict[str, Path]) -> Iterator[tuple[Path, list[str]]]:
    """Groups of tensors of one file.

    An open file stays mapped as far as it was read. It is opened again for each group, so that
    the peak of memory holds the weights once.
    """
    for file in sorted({files[name] for name in names}):
        here = [name for name in names if files[name] == file]
        for start in range(0, len(here), _GROUP_SIZE):
            yield file, here[start : start + _GROUP_SIZE]


_GROUP_SIZE = 64
_DTYPES = ("F64", "F32", "F16", "BF16")


def _stacked_rows(table: Iterable[Tensor]) -> dict[tuple[str, ...], int]:
    rows: dict[tuple[str, ...], int] = {}
    for tensor in table:
        if tensor.row is not None:
            rows[tensor.path] = max(rows.get(tensor.path, 0), tensor.row + 1)
    return rows


def _put(params, tensor: Tensor, array: np.ndarray, stacked) -> None:
    *parents, leaf = tensor.path
    for name in parents:
        params = params.setdefault(name, {})
    if tensor.row is None:
        params[leaf] = np.ascontiguousarray(array)
    else:
        if leaf not in params:
            params[leaf] = np.empty((stacked[tensor.path], *array.shape), np.float32)
        params[leaf][tensor.row] = array


def write_official(path: Path, config: CodecConfig, params: dict[str, Any], dtype: str) -> None:
    """Writes a complete official directory into the existing folder `path`.

    Args:
      path: An empty folder.
      config: The codec.
      params: All its parameters, arrays of any float type.
      dtype: "float32" or "bfloat16", of the written tensors.
    """
    (path / "config.json").write_text(write_config(config, dtype))
    shards = _shards(tensor_table(config), np.dtype(dtype).itemsize)
    weight_map, total = {}, 0
    for i, shard in enumerate(shards):
        name = WEIGHTS_NAME
        if len(shards) > 1:
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        arrays = {t.name: _get(params, t, dtype) for t in shard}
        write_tensors(path / name, arrays, {"format": "pt"})
        weight_map |= dict.fromkeys(arrays, name)
        total += sum(a.nbytes for a in arrays.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(
    path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file; OSError where that fails."""
    try:
        safetensors.numpy.save_file(arrays, path, metadata)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: could not be written: {error}") from error
    storage.set_mode(path)  # safetensors writes for the owner alone


def _shards(table: list[Tensor], itemsize: int) -> list[list[Tensor]]:
    shards, size = [[]], 0
    for tensor in table:
        size_bytes = math.prod(tensor.shape) * itemsize
        if shards[-1] and size + size_bytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += size_bytes
    return shards


def _get(params, tensor: Tensor, dtype: str) -> np.ndarray:
    for name in tensor.path:
        params = params[name]
    array = params if tensor.row is None else params[tensor.row]
    return np.ascontiguousarray(tensor.to_official(np.asarray(array)), dtype=dtype)
