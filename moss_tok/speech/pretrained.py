"""Loads speech models from checkpoints, workdirs and the official layout.

A checkpoint has `config.json`, `params/` and, unless the tokens are bytes, `tokenizer.json`; and,
converted from an official directory, perhaps `unused/`, see `speech.huggingface`.
"""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from moss_tok import checkpoint, storage, tensors
from moss_tok.codec.pretrained import to_device
from moss_tok.json_files import read_json_object
from moss_tok.language import text
from moss_tok.language.text import Tokenizer
from moss_tok.nn.compute import ComputeConfig
from moss_tok.speech import huggingface, huggingface_config
from moss_tok.speech.config import SpeechConfig
from moss_tok.speech.huggingface import UNUSED
from moss_tok.speech.layout import is_chat
from moss_tok.speech.model import SpeechModel
from moss_tok.speech.steps import Speech

_CONFIG = "config.json"
_PARAMS = "params"
_UNUSED = "unused"
TOKENIZER = "tokenizer.json"


def load(path: str | storage.Path, compute: ComputeConfig | None = None) -> Speech:
    """Loads the speech model of a checkpoint, a training workdir or an official directory.

    Args:
      path: A checkpoint; a training workdir; a directory of MossTTSLocal 1.0 in the official
        Hugging Face layout, with its tokenizer.json; or the Hub id of one.
      compute: Types, precision and attention of the computation; default: float32 at the highest
        matmul precision.

    Returns:
      `Speech` with float32 parameters on the default device.

    Raises:
      ValueError: There is no checkpoint at `path`, it holds no speech model, it is damaged, or it
        is of another architecture.
    """
    folder = checkpoint.find_checkpoint(path)
    config, tokenizer = load_config(folder)
    return Speech(read_params(folder, config), config, tokenizer, compute or ComputeConfig())


def is_speech(folder: storage.Path) -> bool:
    """Whether a checkpoint or an official directory holds a speech model, supported or not."""
    with contextlib.suppress(ValueError):
        fields = read_json_object(folder / _CONFIG)
        return "temporal" in fields or huggingface_config.is_speech(fields)
    return False


def load_config(folder: storage.Path) -> tuple[SpeechConfig, Tokenizer]:
    """Reads the config and the tokenizer of a checkpoint or an official directory.

    Raises:
      ValueError: It holds no speech model, or the tokenizer is missing or does not fit it.
    """
    config = read_config(folder)
    path = folder / TOKENIZER
    tokenizer = text.load_beside(path)
    lacks_tokens = config.layout == "chat" and not is_chat(tokenizer)
    if lacks_tokens or tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{path}: missing, or not the tokenizer of this model")
    return config, tokenizer


def read_config(folder: storage.Path) -> SpeechConfig:
    """Reads the config of a checkpoint or an official directory.

    Raises:
      ValueError: It holds no speech model, or one that is broken or not supported.
    """
    if not is_speech(folder):
        raise ValueError(f"{folder}: holds no speech model")
    if tensors.is_official(folder):
        return huggingface.read_folder_config(folder)
    try:
        return SpeechConfig.from_json((folder / _CONFIG).read_text())
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / _CONFIG}: {error}") from error


def read_params(folder: storage.Path, config: SpeechConfig, unused: bool = False) -> Any:
    """Reads the parameters of a checkpoint or an official directory.

    Args:
      folder: The directory.
      config: What `read_config` returned.
      unused: Whether to read the embedding that the official class never reads, where it is, as
        UNUSED of `speech.huggingface`.

    Returns:
      float32 parameters on the default device.

    Raises:
      ValueError: Parameters are missing, misshapen or damaged.
    """
    if tensors.is_official(folder):
        return to_device(huggingface.read_official(folder, unused)[1])
    params = checkpoint.read_tree(folder / _PARAMS, nn.meta.unbox(boxed_shapes(config)))
    if unused and (folder / _UNUSED).is_dir():
        shape = params["text_embedding"].shape
        shapes = {UNUSED: jax.ShapeDtypeStruct(shape, jnp.float32)}
        params |= checkpoint.read_tree(folder / _UNUSED, shapes)
    return params


def save(
    path: storage.Path,
    config: SpeechConfig,
    params: dict[str, Any],
    tokenizer_json: str = "",
    files: dict[str, str] | None = None,
) -> None:
    """Writes a speech model as a new checkpoint directory; see `checkpoint.save`.

    Args:
      path: New directory.
      config: The model.
      params: Its parameters, with or without UNUSED of `speech.huggingface`.
      tokenizer_json: The content of its tokenizer.json; "": its tokens are bytes.
      files: Further text files by name, such as training.json.
    """
    texts = {_CONFIG: config.to_json()} | (files or {})
    if tokenizer_json:
        texts[TOKENIZER] = tokenizer_json
    trees = {_PARAMS: {name: value for name, value in params.items() if name != UNUSED}}
    if UNUSED in params:
        trees[_UNUSED] = {UNUSED: params[UNUSED]}
    checkpoint.save(path, texts, trees)


def files(config: SpeechConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """The contents, by name, of the text files of a checkpoint that `load_config` reads."""
    texts = {_CONFIG: config.to_json()}
    if tokenizer.json:
        texts[TOKENIZER] = tokenizer.json
    return texts


@functools.lru_cache(maxsize=8)
def boxed_shapes(config: SpeechConfig) -> Any:
    """ShapeDtypeStructs of the parameters, in Flax boxes that carry logical axis names."""
    return jax.eval_shape(functools.partial(init_boxed, config), jax.random.key(0))


def init_boxed(config: SpeechConfig, key: jax.Array) -> Any:
    """Initial parameters in Flax boxes that carry logical axis names."""
    text = jnp.zeros((1, 2), jnp.int32)
    codes = jnp.zeros((1, config.num_quantizers, 2), jnp.int32)
    in_use = jnp.ones((1, config.num_quantizers), bool)
    return SpeechModel(config).init(key, text, codes, in_use)["params"]
