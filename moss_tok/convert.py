"""Converts a codec or a speech model between the official layout and the layout of moss_tok."""

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from moss_tok import checkpoint, storage, tensors
from moss_tok.codec import huggingface, pretrained
from moss_tok.errors import check_choice
from moss_tok.json_files import format_json
from moss_tok.speech import huggingface as speech_huggingface
from moss_tok.speech import pretrained as speech_pretrained

_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def convert(source: str | Path, destination: str | Path, dtype: str = "float32") -> str:
    """Converts a codec or a speech model to the other layout.

    `destination` appears only when it is complete.

    Args:
      source: An official directory or Hub id, which becomes a moss_tok checkpoint; or a moss_tok
        checkpoint or training workdir, which becomes an official directory.
      destination: New directory, in an existing folder.
      dtype: Type of the stored weights, "float32" (bit-exact in both directions), "float16" or
        "bfloat16".

    Returns:
      The layout that was written: "checkpoint" or "official".

    Raises:
      ValueError: `source` is missing, broken or not supported, `destination` exists, its folder
        does not exist, dtype is unknown, or a weight does not fit into it.
    """
    check_choice("dtype", dtype, tuple(_DTYPES))
    folder = checkpoint.find_checkpoint(source)
    destination = storage.to_local_path(destination)
    checkpoint.check_destination(destination)
    training = checkpoint.read_training(folder)
    files = {}
    if training:
        files[checkpoint.TRAINING_NAME] = format_json(training)
    if speech_pretrained.is_speech(folder):
        return _convert_speech(folder, destination, dtype, files)
    if tensors.is_official(folder):
        config, params = huggingface.read_official(folder)
        _check_range(params, dtype)
        if dtype != "float32":
            params = jax.tree.map(lambda x: x.astype(_DTYPES[dtype]), params)
        pretrained.save(destination, config, pretrained.to_device(params), files)
        return "checkpoint"
    codec = pretrained.load(folder)
    _check_range(codec.params, dtype)
    with checkpoint.new_directory(destination) as temporary:
        huggingface.write_official(temporary, codec.config, codec.params, dtype)
        for name, text in files.items():
            (temporary / name).write_text(text)
    return "official"


def _check_range(params: Any, dtype: str) -> None:
    """Raises ValueError if a weight is too large for the type."""
    largest = 0.0
    for leaf in jax.tree.leaves(params):
        largest = max(largest, float(np.abs(leaf).max()))
    limit = float(ml_dtypes.finfo(_DTYPES[dtype]).max)
    if largest > limit:
        raise ValueError(
            f"{dtype} holds numbers up to {limit:g}, the largest weight is {largest:g}"
        )


def _convert_speech(
    folder: storage.Path, destination: Path, dtype: str, files: dict[str, str]
) -> str:
    """Converts a speech model, and writes further `files` beside it, text by name."""
    config = speech_pretrained.read_config(folder)
    params = speech_pretrained.read_params(folder, config, unused=True)
    _check_range(params, dtype)
    tokenizer = folder / speech_pretrained.TOKENIZER
    tokenizer_json = tokenizer.read_text() if tokenizer.is_file() else ""
    if tensors.is_official(folder):
        unused = speech_huggingface.UNUSED
        if np.array_equal(params[unused], params["text_embedding"]):
            del params[unused]  # writing fills it in again
        params = jax.tree.map(lambda x: x.astype(_DTYPES[dtype]), params)
        speech_pretrained.save(destination, config, params, tokenizer_json, files)
        return "checkpoint"
    with checkpoint.new_directory(destination) as temporary:
        speech_huggingface.write_official(temporary, config, params, dtype)
        if tokenizer_json:
            files = files | {speech_pretrained.TOKENIZER: tokenizer_json}
        for name, text in files.items():
            (temporary / name).write_text(text)
    return "official"
