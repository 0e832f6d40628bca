"""Reads and writes speech models in the official Hugging Face layout (MossTTSLocal 1.0).

One table serves both directions, see `moss_tok.tensors`. The language model inside the official
class has an embedding that the class stores and never reads. Conversion keeps it beside the
parameters. A model of our own has no such embedding; the embedding of the text channel is written
in its place.

Source: MossTTSDelayModel in moss_tts_local/modeling_moss_tts.py of OpenMOSS/MOSS-TTS.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moss_tok import tensors
from moss_tok.language.qwen import block_rows, mlp_rows
from moss_tok.speech.config import SpeechConfig
from moss_tok.speech.huggingface_config import read_config, write_config
from moss_tok.tensors import Tensor

UNUSED = "unused_embedding"  # in the tree of parameters, that of the inner language model


def tensor_table(config: SpeechConfig) -> list[Tensor]:
    """Rows of the official tensors of a speech model."""
    c = config
    width = c.temporal.model_dim
    embeddings = (c.vocab_size, width)
    rows = [
        _same("model.embedding_list.0.weight", embeddings, ("text_embedding",)),
        _same("model.language_model.embed_tokens.weight", embeddings, (UNUSED,)),
        _same("model.language_model.norm.weight", (width,), ("temporal_norm", "scale")),
        _same("local_transformer.norm.weight", (c.depth.model_dim,), ("depth_norm", "scale")),
    ]
    blocks = "model.language_model.layers."
    rows += block_rows(c.temporal.block, c.temporal.num_layers, blocks, ("temporal",))
    blocks = "local_transformer.layers."
    rows += block_rows(c.depth.block, c.depth.num_layers, blocks, ("depth",))
    dims = (width, c.adapter_dim, c.depth.model_dim)
    rows += mlp_rows(dims, "speech_embedding_to_local_mlp.", ("into_depth",))
    return rows + list(_channel_rows(c))


def _same(name, shape, path, row=None) -> Tensor:
    return Tensor(name, shape, path, row, lambda x: x, lambda x: x)


def _channel_rows(c: SpeechConfig) -> Iterator[Tensor]:
    """Rows of the adapters, norms and heads of all channels, and of the embeddings of codes."""
    width = c.temporal.model_dim
    dims = (c.depth.model_dim, c.adapter_dim, width)
    for channel in range(c.num_channels):
        prefix = f"local_to_speech_embedding_mlps.{channel}."
        yield from mlp_rows(dims, prefix, ("out",), channel)
        norm = f"layer_norm_before_lm_heads.{channel}.weight"
        yield _same(norm, (width,), ("out", "scale"), channel)
    path = ("out", "text_head")
    shape = (c.vocab_size, width)
    yield Tensor("lm_heads.0.weight", shape, path, None, np.transpose, np.transpose)
    shape = (c.codebook_size + 1, width)
    for level in range(c.num_quantizers):
        embedding = f"model.embedding_list.{level + 1}.weight"
        yield _same(embedding, shape, ("code_embeddings",), level)
        head = f"lm_heads.{level + 1}.weight"
        path = ("out", "code_heads")
        yield Tensor(head, shape, path, level, np.transpose, np.transpose)


def read_folder_config(path: Path) -> SpeechConfig:
    """Reads the config of an official directory; ValueError if it is not supported or broken."""
    try:
        return read_config((path / "config.json").read_text())
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_official(path: Path, unused: bool = False) -> tuple[SpeechConfig, dict[str, Any]]:
    """Reads an official directory.

    Args:
      path: Directory with config.json and safetensors.
      unused: Whether to read the embedding that the official class never reads, as UNUSED.

    Returns:
      The config, and the parameters as a tree of float32 numpy arrays.

    Raises:
      ValueError: A file or tensor is missing, unknown, misshapen or corrupt; all bad tensors are
        named. Or the directory is of another architecture.
    """
    config = read_folder_config(path)
    table = tensor_table(config)
    names = {tensor.name for tensor in table if unused or tensor.path != (UNUSED,)}
    return config, tensors.read_tensors(path, tensors.tensor_files(path), table, names)


def write_official(path: Path, config: SpeechConfig, params: dict[str, Any], dtype: str) -> None:
    """Writes a speech model in the official layout into the existing folder `path`.

    Args:
      path: An empty folder.
      config: The model.
      params: All its parameters, arrays of any float type; with or without UNUSED.
      dtype: Type of the written tensors, "float32" or "bfloat16".

    Raises:
      ValueError: The official class cannot express this model.
    """
    (path / "config.json").write_text(write_config(config, dtype))
    params = {UNUSED: params["text_embedding"]} | params
    tensors.write_folder(path, tensor_table(config), params, dtype)
