"""Loads language models, which are stored in the checkpoint of the codec that they use.

Besides the files of the codec, such a checkpoint has `language.json`, `language/` (Orbax) and,
unless the tokens are bytes, `tokenizer.json`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from moss_tok import checkpoint, storage
from moss_tok.language import config as configs
from moss_tok.language import qwen, text
from moss_tok.language.config import LanguageConfig
from moss_tok.language.generate import Language
from moss_tok.language.model import SemanticHead
from moss_tok.language.text import Tokenizer
from moss_tok.nn.compute import ComputeConfig

TREE = "language"
_CONFIG = "language.json"
_TOKENIZER = "tokenizer.json"


def load(path: str | storage.Path | None, compute: ComputeConfig | None = None) -> Language:
    """Loads the language model of a checkpoint or training workdir.

    `moss_tok.load` loads the codec of the same checkpoint.

    Args:
      path: A checkpoint or a training workdir, see `moss_tok.load`.
      compute: Types, precision and attention of the computation; default: float32 at the highest
        matmul precision.

    Returns:
      `Language` with float32 parameters on the default device.

    Raises:
      ValueError: There is no checkpoint at `path`, it has no language model, or it is damaged.
    """
    folder = checkpoint.find_checkpoint(path)
    config_and_tokenizer = load_config(folder)
    if config_and_tokenizer is None:
        raise ValueError(
            f"{path or folder}: has no language model; train one with --language_model"
        )
    config, tokenizer = config_and_tokenizer
    params = checkpoint.read_tree(folder / TREE, nn.meta.unbox(boxed_shapes(config)))
    return Language(params, config, tokenizer, compute or ComputeConfig())


def load_config(folder: storage.Path) -> tuple[LanguageConfig, Tokenizer] | None:
    """Reads the config and the tokenizer of a checkpoint's language model; None if it has none.

    Raises:
      ValueError: The config is broken, or the tokenizer is missing or does not fit it.
    """
    path = folder / _CONFIG
    if not path.is_file():
        return None
    try:
        config = LanguageConfig.from_json(path.read_text())
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    tokenizer_path = folder / _TOKENIZER
    tokenizer = text.load_beside(tokenizer_path)
    if tokenizer.end_id != config.end_id or tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{tokenizer_path}: missing, or not the tokenizer that {path.name} was made with"
        )
    return config, tokenizer


def files(config: LanguageConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """The contents, by name, of the text files of a checkpoint that `load_config` reads."""
    texts = {_CONFIG: config.to_json()}
    if tokenizer.json:
        texts[_TOKENIZER] = tokenizer.json
    return texts


def find(
    model: str,
    tokenizer: str,
    latents_dim: int,
    audio: str,
    earlier: Tokenizer | None = None,
) -> tuple[LanguageConfig, Tokenizer]:
    """Returns the config and the tokenizer of a new language model.

    Args:
      model: A preset, or a directory with Qwen2.5 weights.
      tokenizer: A tokenizer.json, a folder with one, or "bytes"; "": the tokenizer of the directory
        `model`, or for a preset `earlier`.
      latents_dim: Width of the codec's latents.
      audio: "codes" or "latents", see `LanguageConfig`.
      earlier: The tokenizer of a model that the run continues or starts from; default: bytes.

    Raises:
      ValueError: There is no such model, or the tokenizer does not fit it.
    """
    folder = storage.to_path(model)
    if model in configs.PRESETS:
        loaded = text.load(tokenizer) if tokenizer or earlier is None else earlier
        config = configs.preset(model, latents_dim, loaded.vocab_size, loaded.end_id, audio)
        return config, loaded
    if not qwen.is_qwen(folder):
        raise ValueError(
            f"language_model must be one of {', '.join(configs.PRESETS)} or a directory with "
            f"config.json and safetensors, got {model!r}"
        )
    loaded = text.load(tokenizer or folder)
    config = qwen.read_config(folder, latents_dim, loaded.end_id, audio)
    if loaded.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {loaded.vocab_size} tokens, the limit of {model} is "
            f"{config.vocab_size}"
        )
    return config, loaded


def init(config: LanguageConfig, key: jax.Array) -> Any:
    """Initial parameters of a semantic head."""
    return nn.meta.unbox(init_boxed(config, key))


def start(model: str, config: LanguageConfig) -> Any | None:
    """Initial parameters with the pretrained weights of `model` (see `find`); None for presets."""
    if model in configs.PRESETS:
        return None
    params = init(config, jax.random.key(0))
    return params | {"model": qwen.read_params(storage.to_local_path(model), config)}


@functools.lru_cache(maxsize=8)
def boxed_shapes(config: LanguageConfig) -> Any:
    """ShapeDtypeStructs of the parameters, in Flax boxes that carry logical axis names."""
    return jax.eval_shape(functools.partial(init_boxed, config), jax.random.key(0))


def init_boxed(config: LanguageConfig, key: jax.Array) -> Any:
    """`init` in Flax boxes that carry logical axis names."""
    latents = jnp.zeros((1, 1, config.latents_dim))
    ones = jnp.ones(1, jnp.int32)
    task = jnp.zeros(1, jnp.int32)
    return SemanticHead(config).init(key, latents, ones, task, ones[None], ones)["params"]
