"""Reads and writes safetensors files of other projects, with a table that maps their tensors."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors looks up by name
import numpy as np
import safetensors
import safetensors.numpy

from moss_tok import storage
from moss_tok.json_files import read_json_object

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9
_GROUP_SIZE = 64  # tensors per opening of a file
_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A row of the table: an official tensor, and the parameter that holds it.

    Attributes:
      name: Official name.
      shape: Official shape.
      path: Path of the parameter in our tree.
      row: Row of a parameter that is stacked over layers or quantizers; None for the whole one.
      to_ours: Converts the official array to our layout.
      to_official: The inverse of `to_ours`.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    row: int | None
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_official: Callable[[np.ndarray], np.ndarray]


def is_official(path: Path) -> bool:
    """Whether a directory has official weights: one safetensors file, or an index of several."""
    return (path / WEIGHTS_NAME).exists() or (path / INDEX_NAME).exists()


def tensor_files(path: Path) -> dict[str, Path]:
    """The file of each tensor in an official directory, by the tensor's name.

    Raises:
      ValueError: A file is missing or corrupt, or the index does not match the files.
    """
    if not (path / INDEX_NAME).exists():
        return dict.fromkeys(_names(path / WEIGHTS_NAME), path / WEIGHTS_NAME)
    index = read_json_object(path / INDEX_NAME)
    weight_map = index.get("weight_map")
    file_names = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(name, str) and Path(name).name for name in file_names):
        raise ValueError(f"{path / INDEX_NAME}: weight_map must give a file per tensor")
    files = {name: path / Path(file).name for name, file in weight_map.items()}
    for file in sorted(set(files.values())):
        _check_index(files, file)
    return files


def _check_index(files: dict[str, Path], file: Path) -> None:
    """Raises ValueError unless a file has exactly the tensors that the index `files` gives it."""
    stored = set(_names(file))
    indexed = {name for name, indexed_file in files.items() if indexed_file == file}
    if missing := sorted(indexed - stored):
        raise ValueError(f"{file}: lacks {len(missing)} tensors of the index: {missing[0]} ...")
    if extra := sorted(stored - indexed):
        raise ValueError(f"{file}: {extra[0]} is not in the index, or belongs to another file")


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
        reason = "a link to a missing file" if file.is_symlink() else "no such file"
        raise ValueError(f"{file}: {reason}") from error
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error


def read_tensors(
    path: Path, files: dict[str, Path], table: Iterable[Tensor], wanted: set[str]
) -> dict[str, Any]:
    """Reads some tensors of a table into a tree of float32 numpy arrays.

    Args:
      path: The directory, for error messages.
      files: Files of all stored tensors, by name.
      table: All tensors that must be stored; all are checked.
      wanted: Names of the tensors to read.

    Raises:
      ValueError: Tensors are missing, unknown, misshapen or of another type; all of them are named.
    """
    table = {t.name: t for t in table}
    problems = [f"missing {name}" for name in table.keys() - files.keys()]
    problems += [f"unknown {name}" for name in files.keys() - table.keys()]
    params: dict[str, Any] = {}
    stacked = _stacked_rows(table.values())
    for file, names in _batches([n for n in table if n in files], files):
        with _open(file) as tensors:
            for name in names:
                tensor = table[name]
                stored = tensors.get_slice(name)
                shape = tuple(stored.get_shape())
                dtype = stored.get_dtype()
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
    """Groups of tensor names, each of one file.

    The parts of a file that were read stay mapped in memory until it is closed. Opening it again
    for each group keeps the peak of memory at one copy of the weights.
    """
    for file in sorted({files[name] for name in names}):
        file_names = [name for name in names if files[name] == file]
        for start in range(0, len(file_names), _GROUP_SIZE):
            yield file, file_names[start : start + _GROUP_SIZE]


def _stacked_rows(table: Iterable[Tensor]) -> dict[tuple[str, ...], int]:
    """Number of rows of each stacked parameter, by its path."""
    rows: dict[tuple[str, ...], int] = {}
    for tensor in table:
        if tensor.row is not None:
            rows[tensor.path] = max(rows.get(tensor.path, 0), tensor.row + 1)
    return rows


def _put(params, tensor: Tensor, array: np.ndarray, stacked) -> None:
    """Stores the array of a tensor in the tree `params`."""
    *parents, leaf = tensor.path
    for name in parents:
        params = params.setdefault(name, {})
    if tensor.row is None:
        params[leaf] = np.ascontiguousarray(array)
    else:
        if leaf not in params:
            params[leaf] = np.empty((stacked[tensor.path], *array.shape), np.float32)
        params[leaf][tensor.row] = array


def write_tensors(
    path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file. Raises OSError if that fails."""
    try:
        safetensors.numpy.save_file(arrays, path, metadata)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: could not be written: {error}") from error
    storage.set_mode(path)  # safetensors makes files that only their owner can read


def write_folder(
    path: Path,
    table: list[Tensor],
    params: dict[str, Any],
    dtype: str,
    constants: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes the tensors of a table into a folder, with an index if they need several files.

    Args:
      path: An empty folder.
      table: What to write.
      params: All parameters that the table names, arrays of any float type.
      dtype: Type of the written tensors, "float32", "float16" or "bfloat16".
      constants: Further tensors, for the first file.
    """
    shards = split(table, np.dtype(dtype).itemsize)
    weight_map = {}
    total_bytes = 0
    for i, shard in enumerate(shards):
        name = WEIGHTS_NAME
        if len(shards) > 1:
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        arrays = {t.name: official_array(params, t, dtype) for t in shard}
        if i == 0:
            arrays |= constants or {}
        write_tensors(path / name, arrays, {"format": "pt"})
        weight_map |= dict.fromkeys(arrays, name)
        total_bytes += sum(array.nbytes for array in arrays.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (path / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def split(table: list[Tensor], itemsize: int) -> list[list[Tensor]]:
    """Splits a table into shards of at most MAX_SHARD_BYTES, at `itemsize` bytes per number."""
    shards = [[]]
    size = 0
    for tensor in table:
        size_bytes = math.prod(tensor.shape) * itemsize
        if shards[-1] and size + size_bytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += size_bytes
    return shards


def official_array(params, tensor: Tensor, dtype: str) -> np.ndarray:
    """The official array of a tensor, from our parameters."""
    for name in tensor.path:
        params = params[name]
    array = params if tensor.row is None else params[tensor.row]
    return np.ascontiguousarray(tensor.to_official(np.asarray(array)), dtype=dtype)
