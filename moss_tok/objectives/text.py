"""The text term: a language model reads a recording's frames and predicts its text."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from moss_tok import checkpoint, sharding
from moss_tok.codec.config import CodecConfig
from moss_tok.data import sources
from moss_tok.language import pretrained as language_models
from moss_tok.language.config import LanguageConfig
from moss_tok.language.model import SemanticHead
from moss_tok.language.text import Tokenizer
from moss_tok.nn.compute import ComputeConfig
from moss_tok.objectives.config import TextSettings
from moss_tok.training import checkpoints
from moss_tok.training.objective import Batch, Say, Term

TERM = "semantic_loss"
FOLDER = language_models.TREE  # also the name of its parameters


def item_shapes(settings: TextSettings) -> dict[str, tuple[tuple[int, ...], Any]]:
    """What a text adds to an item of a batch: "task", an index into TASKS, and the tokens."""
    return {
        "task": ((), jnp.int32),
        "text": ((settings.max_text_tokens,), jnp.int32),
        "text_length": ((), jnp.int32),  # 0: no text
    }


def draw_hidden_frames(
    share: float, num_frames: int, key: jax.Array, positions: jax.Array, lengths: jax.Array
) -> jax.Array:
    """Frames that the language model does not hear: two spans of each item.

    Args:
      share: Up to this share of the frames is hidden.
      num_frames: T.
      key: For the draws; an item's depend on its place in the batch alone.
      positions: [B] places in the global batch.
      lengths: [B] frames.

    Returns:
      bool [B, T].

    Source: SpecAugment's masks in time (arXiv 1904.08779).
    """
    frames = jnp.arange(num_frames)

    def draw(position, size):
        width, start = jax.random.uniform(jax.random.fold_in(key, position), (2, 2))
        width = width * size * share / 2
        start = start * (size - width)
        return ((frames[:, None] >= start) & (frames[:, None] < start + width)).any(-1)

    return jax.vmap(draw)(positions, lengths)


def cross_entropy(
    config: LanguageConfig,
    compute: ComputeConfig,
    params: Any,
    frames: jax.Array,
    num_frames: jax.Array,
    part: Batch,
) -> jax.Array:
    """Cross-entropy [B], in nats, of each text given frames [B, T, D], of which [B] count."""
    if "hidden" in part:
        frames = jnp.where(part["hidden"][..., None], 0, frames)
    head = SemanticHead(config, compute)
    text = (part[name] for name in ("task", "text", "text_length"))
    return head.apply({"params": params}, frames, num_frames, *text)


def term(settings: TextSettings, value: jax.Array) -> Term:
    """The term of the loss; it counts for items with a text."""
    return Term(value, settings.semantic_weight)


def find_model(
    settings: TextSettings, codec: CodecConfig
) -> tuple[LanguageConfig, Tokenizer] | tuple[None, None]:
    """The language model that a run is to train, and its tokenizer; None twice for none.

    Raises:
      ValueError: No such model, or a tokenizer that does not fit.
    """
    if not settings.language_model:
        return None, None
    quantizer = codec.quantizer
    hears_codes = settings.language_input == "codes"
    latents_dim = quantizer.output_dim if hears_codes else quantizer.input_dim
    return language_models.find(
        settings.language_model, settings.tokenizer, latents_dim, settings.language_input
    )


def start_params(
    settings: TextSettings,
    config: LanguageConfig,
    tokenizer: Tokenizer,
    init_from: str,
    shapes: Any,
) -> tuple[Any | None, bool]:
    """What the language model starts from, None for fresh; whether it came with `init_from`.

    The language model of `init_from`, if that has this one, goes before published weights.
    """
    if init_from:
        folder = checkpoint.find_checkpoint(init_from)
        found = language_models.load_config(folder)
        if found is not None and found[0] == config and found[1].json == tokenizer.json:
            return checkpoints.load_folder(init_from, FOLDER, shapes), True
    params = language_models.start(settings.language_model, config)
    if params is None:
        return None, False
    return sharding.whole(params, jax.tree.map(lambda x: x.sharding, shapes)), False


def check_texts(
    settings: TextSettings,
    mixture: sources.Mixture | None,
    tokenizer: Tokenizer,
    segment_seconds: float,
    say: Say,
) -> None:
    """Says how many texts are used; ValueError where the language model has none to learn from.

    Texts in shards are not counted: one would have to read all of them.
    """
    found = mixture.sources if mixture else ()
    if not all(isinstance(source, sources.FileSource) for source in found):
        return
    texts = [text for source in found for text in source.texts(segment_seconds)]
    limit = settings.max_text_tokens
    used = sum(len(tokenizer.encode(text)) <= limit for text in texts)
    if not used:
        raise ValueError(
            f"train_data has no recording of at most segment_seconds {segment_seconds:.3g} with a "
            f"text of at most max_text_tokens {limit} for language_model to learn"
        )
    total = sum(len(source.texts(math.inf)) for source in found)
    say(
        f"{used} of {total} texts are used: no longer than max_text_tokens "
        f"{limit}, of recordings no longer than {segment_seconds:.3g} s"
    )
