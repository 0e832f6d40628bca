"""Reads and writes safetensors files of other projects, with a table that maps their tensors."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors looks up by name
import numpy as np
import safetensors
import safetensors.numpy

from moss_tok import storage
from moss_tok.json_files import format_json, read_json_object

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9
_GROUP_SIZE = 64  # tensors that are read before a file is opened again
_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A row of the table: an official tensor, and the parameter that holds it.

    Attributes:
      name: Official name.
      shape: Official shape.
      path: Path of the parameter in our tree.
      row: Row of a parameter that is stacked over layers or quantizers; None for a parameter that
        is not stacked.
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
    error = ValueError(f"{path / INDEX_NAME}: weight_map must give a file per tensor")
    if not isinstance(weight_map, dict):
        raise error
    files = {}
    names_by_file: dict[Path, set[str]] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not Path(file_name).name:
            raise error
        files[name] = path / Path(file_name).name
        names_by_file.setdefault(files[name], set()).add(name)
    for file in sorted(names_by_file):
        _check_index(file, names_by_file[file])
    return files


def _check_index(file: Path, indexed: set[str]) -> None:
    """Raises ValueError unless a file has exactly the tensors `indexed`."""
    stored = set(_names(file))
    missing = sorted(indexed - stored)
    if missing:
        raise ValueError(f"{file}: lacks {len(missing)} tensors of the index: {missing[0]} ...")
    extra = sorted(stored - indexed)
    if extra:
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
    path: Path,
    files: dict[str, Path],
    table: Iterable[Tensor],
    requested: set[str],
) -> dict[str, Any]:
    """Reads some tensors of a table into a tree of float32 numpy arrays.

    Args:
      path: The directory, for error messages.
      files: Files of all stored tensors, by name.
      table: All tensors that must be stored; all are checked.
      requested: Names of the tensors to read.

    Raises:
      ValueError: Tensors are missing, unknown, misshapen or of another type; all of them are named.
    """
    tensor_of = {tensor.name: tensor for tensor in table}
    problems = [f"missing {name}" for name in tensor_of.keys() - files.keys()]
    problems += [f"unknown {name}" for name in files.keys() - tensor_of.keys()]
    params: dict[str, Any] = {}
    num_rows = _num_rows(tensor_of.values())
    names = [name for name in tensor_of if name in files]
    for file, group in _group_by_file(names, files):
        with _open(file) as tensors:
            for name in group:
                tensor = tensor_of[name]
                problem = _problem(tensor, tensors.get_slice(name))
                if problem:
                    problems.append(problem)
                elif name in requested and not problems:
                    array = tensors.get_tensor(name).astype(np.float32)
                    _put(params, tensor, tensor.to_ours(array), num_rows)
    if problems:
        raise ValueError(f"{path}: {len(problems)} bad tensors: {'; '.join(sorted(problems))}")
    return params


def _problem(tensor: Tensor, stored: Any) -> str:
    """Why a stored tensor cannot be read; "" if it can."""
    shape = tuple(stored.get_shape())
    dtype = stored.get_dtype()
    if dtype not in _DTYPES:
        return f"{tensor.name} has type {dtype}, not one of {', '.join(_DTYPES)}"
    if shape != tensor.shape:
        return f"{tensor.name} has shape {shape}, not {tensor.shape}"
    return ""


def _group_by_file(names: list[str], files: dict[str, Path]) -> Iterator[tuple[Path, list[str]]]:
    """Yields groups of tensor names, each of one file.

    The parts of a file that were read stay mapped in memory until it is closed. Opening it again
    for each group keeps the peak of memory at one copy of the weights.
    """
    names_by_file: dict[Path, list[str]] = {}
    for name in names:
        names_by_file.setdefault(files[name], []).append(name)
    for file in sorted(names_by_file):
        file_names = names_by_file[file]
        for start in range(0, len(file_names), _GROUP_SIZE):
            yield file, file_names[start : start + _GROUP_SIZE]


def _num_rows(table: Iterable[Tensor]) -> dict[tuple[str, ...], int]:
    """Number of rows of each stacked parameter, by its path."""
    num_rows: dict[tuple[str, ...], int] = {}
    for tensor in table:
        if tensor.row is not None:
            known = num_rows.get(tensor.path, 0)
            num_rows[tensor.path] = max(known, tensor.row + 1)
    return num_rows


def _put(
    params: dict[str, Any],
    tensor: Tensor,
    array: np.ndarray,
    num_rows: dict[tuple[str, ...], int],
) -> None:
    """Stores the array of a tensor in the tree `params`."""
    *parents, leaf = tensor.path
    for name in parents:
        params = params.setdefault(name, {})
    if tensor.row is None:
        params[leaf] = np.ascontiguousarray(array)
        return
    if leaf not in params:
        shape = (num_rows[tensor.path], *array.shape)
        params[leaf] = np.empty(shape, np.float32)
    params[leaf][tensor.row] = array


def write_tensors(
    path: Path,
    arrays: dict[str, np.ndarray],
    metadata: dict[str, str] | None = None,
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
      table: The tensors to write.
      params: All parameters that the table names, arrays of any float type.
      dtype: Type of the written tensors, "float32", "float16" or "bfloat16".
      constants: Tensors that are not in the table; the first file gets them.
    """
    shards = split(table, np.dtype(dtype).itemsize)
    weight_map = {}
    total_bytes = 0
    for number, shard in enumerate(shards, 1):
        name = WEIGHTS_NAME
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {tensor.name: official_array(params, tensor, dtype) for tensor in shard}
        if number == 1:
            arrays |= constants or {}
        write_tensors(path / name, arrays, {"format": "pt"})
        weight_map |= dict.fromkeys(arrays, name)
        for array in arrays.values():
            total_bytes += array.nbytes
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (path / INDEX_NAME).write_text(format_json(index))


def split(table: list[Tensor], itemsize: int) -> list[list[Tensor]]:
    """Splits a table into shards of at most MAX_SHARD_BYTES, at `itemsize` bytes per number."""
    shards = [[]]
    shard_bytes = 0
    for tensor in table:
        tensor_bytes = math.prod(tensor.shape) * itemsize
        if shards[-1] and shard_bytes + tensor_bytes > MAX_SHARD_BYTES:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(tensor)
        shard_bytes += tensor_bytes
    return shards


def official_array(params, tensor: Tensor, dtype: str) -> np.ndarray:
    """The official array of a tensor, from our parameters."""
    for name in tensor.path:
        params = params[name]
    array = params if tensor.row is None else params[tensor.row]
    official = tensor.to_official(np.asarray(array))
    return np.ascontiguousarray(official, dtype=dtype)
