"""Converts a codec between the official Hugging Face layout and ours, in either direction."""

from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from moss_tok import checkpoint, storage, tensors
from moss_tok.codec import huggingface, pretrained
from moss_tok.errors import check_choice

_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def convert(source: str | Path, destination: str | Path, dtype: str = "float32") -> str:
    """Converts `source` into a new directory `destination`, which appears only when complete.

    Args:
      source: An official directory (or Hub id) becomes a checkpoint of ours; a checkpoint or
        training workdir of ours becomes an official directory.
      destination: Must not exist; its folder must.
      dtype: Of the stored weights, "float32" (bit-exact both ways) or "bfloat16".

    Returns:
      What was written: "checkpoint" or "official".

    Raises:
      ValueError: Broken source, or a destination that exists.
    """
    check_choice("dtype", dtype, tuple(_DTYPES))
    folder, destination = checkpoint.find_checkpoint(source), storage.to_local_path(destination)
    checkpoint.check_destination(destination)
    if tensors.is_official(folder):
        config, params = huggingface.read_official(folder)
        if dtype != "float32":
            params = jax.tree.map(lambda x: x.astype(_DTYPES[dtype]), params)
        pretrained.save(destination, config, pretrained.to_device(params))
        return "checkpoint"
    codec = pretrained.load(folder)
    with checkpoint.new_directory(destination) as temporary:
        huggingface.write_official(temporary, codec.config, codec.params, dtype)
    return "official"
