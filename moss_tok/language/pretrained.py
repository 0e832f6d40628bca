"""Language models from disk, beside the codec that they listen to.

A checkpoint with one has `language.json`, `language/` (Orbax) and, unless its tokens are bytes,
`tokenizer.json`, besides what the codec needs.
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


def load(path: str | storage.Path, compute: ComputeConfig | None = None) -> Language:
    """Loads the language model of a checkpoint or workdir.

    Args:
      path: As for `moss_tok.load`; the codec is loaded by that.
      compute: How it will be computed; default: float32 at the highest matmul precision.

    Raises:
      ValueError: No such checkpoint, one without a language model, or a broken one.
    """
    folder = checkpoint.find_checkpoint(path)
    found = load_config(folder)
    if found is None:
        raise ValueError(f"{path}: has no language model; train one with --language_model")
    config, tokenizer = found
    params = checkpoint.read_tree(folder / TREE, nn.meta.unbox(boxed_shapes(config)))
    return Language(params, config, tokenizer, compute or ComputeConfig())


def load_config(folder: storage.Path) -> tuple[LanguageConfig, Tokenizer] | None:
    """What language model a checkpoint has; None if none. Raises ValueError where it is broken."""
    path = folder / _CONFIG
    if not path.is_file():
        return None
    try:
        config = LanguageConfig.from_json(path.read_text())
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    given = folder / _TOKENIZER
    words = text.load(given if given.is_file() else "bytes")
    if words.end_id != config.end_id or words.vocab_size > config.vocab_size:
        raise ValueError(f"{given}: missing, or not the tokenizer that {path.name} is for")
    return config, words


def files(config: LanguageConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """The text files of a checkpoint that `load_config` reads."""
    found = {_CONFIG: config.to_json()}
    return found | {_TOKENIZER: tokenizer.json} if tokenizer.json else found


def find(
    model: str, tokenizer: str, latents_dim: int, audio: str
) -> tuple[LanguageConfig, Tokenizer]:
    """The language model of a run, and its tokenizer.

    Args:
      model: A preset, or a directory with Qwen2.5 weights.
      tokenizer: A tokenizer.json or its folder, "bytes"; "": the directory's, or bytes.
      latents_dim: Width of the codec's frames.
      audio: "codes" or "latents".

    Raises:
      ValueError: No such model, or a tokenizer that does not fit.
    """
    folder = storage.to_path(model)
    if model in configs.PRESETS:
        words = text.load(tokenizer)
        return configs.preset(model, latents_dim, words.vocab_size, words.end_id, audio), words
    if not qwen.is_qwen(folder):
        raise ValueError(
            f"language_model must be one of {', '.join(configs.PRESETS)} or a directory with "
            f"config.json and safetensors, got {model!r}"
        )
    words = text.load(tokenizer or folder)
    config = qwen.read_config(folder, latents_dim, words.end_id, audio)
    if words.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {words.vocab_size} tokens, {model} takes {config.vocab_size}"
        )
    return config, words


def init(config: LanguageConfig, key: jax.Array) -> Any:
    """Fresh parameters of a semantic head."""
    return nn.meta.unbox(init_boxed(config, key))


def start(model: str, config: LanguageConfig) -> Any | None:
    """Parameters of the weights that `model` (see `find`) names; None for presets."""
    if model in configs.PRESETS:
        return None
    params = init(config, jax.random.key(0))
    return params | {"model": qwen.read_params(storage.to_local_path(model), config)}


@functools.lru_cache(maxsize=8)
def boxed_shapes(config: LanguageConfig) -> Any:
    """ShapeDtypeStructs of the parameters, in boxes that carry logical axis names."""
    return jax.eval_shape(functools.partial(init_boxed, config), jax.random.key(0))


def init_boxed(config: LanguageConfig, key: jax.Array) -> Any:
    """`init` in boxes that carry logical axis names."""
    latents, one = jnp.zeros((1, 1, config.latents_dim)), jnp.ones(1, jnp.int32)
    return SemanticHead(config).init(key, latents, one, 0 * one, one[None], one)["params"]
