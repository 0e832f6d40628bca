"""Loads speech models.

A checkpoint has `config.json`, `params/` and, unless the tokens are bytes, `tokenizer.json`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from moss_tok import checkpoint, storage
from moss_tok.language import text
from moss_tok.language.text import Tokenizer
from moss_tok.nn.compute import ComputeConfig
from moss_tok.speech.config import SpeechConfig
from moss_tok.speech.model import SpeechModel
from moss_tok.speech.steps import Speech

_CONFIG = "config.json"
_TOKENIZER = "tokenizer.json"


def load(path: str | storage.Path, compute: ComputeConfig | None = None) -> Speech:
    """Loads the speech model of a checkpoint or training workdir.

    Args:
      path: A checkpoint or a training workdir.
      compute: Types, precision and attention of the computation; default: float32 at the highest
        matmul precision.

    Returns:
      `Speech` with float32 parameters on the default device.

    Raises:
      ValueError: There is no checkpoint at `path`, it holds no speech model, or it is damaged.
    """
    folder = checkpoint.find_checkpoint(path)
    config, tokenizer = load_config(folder)
    params = checkpoint.read_tree(folder / "params", nn.meta.unbox(boxed_shapes(config)))
    return Speech(params, config, tokenizer, compute or ComputeConfig())


def load_config(folder: storage.Path) -> tuple[SpeechConfig, Tokenizer]:
    """Reads the config and the tokenizer of a checkpoint.

    Raises:
      ValueError: It holds no speech model, or the tokenizer is missing or does not fit it.
    """
    path = folder / _CONFIG
    try:
        config = SpeechConfig.from_json(path.read_text())
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}: holds no speech model ({error})") from error
    tokenizer_path = folder / _TOKENIZER
    tokenizer = text.load(tokenizer_path if tokenizer_path.is_file() else "bytes")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{tokenizer_path}: missing, or not the tokenizer of this model")
    return config, tokenizer


def files(config: SpeechConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """The contents, by name, of the text files of a checkpoint that `load_config` reads."""
    texts = {_CONFIG: config.to_json()}
    if tokenizer.json:
        texts[_TOKENIZER] = tokenizer.json
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
