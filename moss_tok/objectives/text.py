"""The text term of the loss: a language model reads encoded frames and predicts the text."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from moss_tok import checkpoint, sharding, storage
from moss_tok.codec.config import CodecConfig
from moss_tok.data import sources
from moss_tok.language import pretrained as language_models
from moss_tok.language.config import LanguageConfig
from moss_tok.language.model import SemanticHead
from moss_tok.language.text import Tokenizer
from moss_tok.nn.compute import ComputeConfig
from moss_tok.objectives.config import TextSettings
from moss_tok.training import checkpoints
from moss_tok.training.config import RunConfig
from moss_tok.training.objective import Batch, Say, Term

TERM = "semantic_loss"
FOLDER = language_models.TREE  # also the name of the language model's parameters


def item_shapes(settings: TextSettings) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Arrays of a text in an item of a batch: "task", an index into TASKS, and tokens."""
    return {
        "task": ((), jnp.int32),
        "text": ((settings.max_text_tokens,), jnp.int32),
        "text_length": ((), jnp.int32),  # 0: no text
    }


def draw_hidden_frames(
    share: float,
    num_frames: int,
    key: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """Frames to hide from the language model: two random spans of each item.

    Args:
      share: Maximum share of frames to hide.
      num_frames: T.
      key: Random key; the draws of an item depend only on the key and its position.
      positions: [B] positions in the global batch.
      lengths: [B] valid frames.

    Returns:
      bool [B, T].

    Source: SpecAugment's masks in time (arXiv 1904.08779).
    """
    frames = jnp.arange(num_frames)

    def draw(position, length):
        item_key = jax.random.fold_in(key, position)
        width, start = jax.random.uniform(item_key, (2, 2))
        width = width * length * share / 2
        start = start * (length - width)
        is_in_span = (frames[:, None] >= start) & (frames[:, None] < start + width)
        return is_in_span.any(-1)

    return jax.vmap(draw)(positions, lengths)


def cross_entropy(
    config: LanguageConfig,
    compute: ComputeConfig,
    params: Any,
    frames: jax.Array,
    num_frames: jax.Array,
    part: Batch,
) -> jax.Array:
    """Cross-entropy [B] of each text in nats, given frames [B, T, D], `num_frames` [B] valid."""
    if "hidden" in part:
        frames = jnp.where(part["hidden"][..., None], 0, frames)
    head = SemanticHead(config, compute)
    text = (part["task"], part["text"], part["text_length"])
    return head.apply({"params": params}, frames, num_frames, *text)


def term(settings: TextSettings, value: jax.Array) -> Term:
    """The loss term; it counts for items with a text only."""
    return Term(value, settings.semantic_weight)


def find_model(
    run: RunConfig | None,
    settings: TextSettings,
    codec: CodecConfig,
) -> tuple[LanguageConfig, Tokenizer] | tuple[None, None]:
    """The language model of a run and its tokenizer; (None, None) without one.

    A new model (a preset) without the setting `tokenizer` has the tokenizer of the language model
    in the workdir, or else in `init_from`. If `run` is None, no checkpoint is read.

    Raises:
      ValueError: The model does not exist, or the tokenizer does not fit.
    """
    if not settings.language_model:
        return None, None
    quantizer = codec.quantizer
    reads_codes = settings.language_input == "codes"
    latents_dim = quantizer.output_dim if reads_codes else quantizer.input_dim
    return language_models.find(
        settings.language_model,
        settings.tokenizer,
        latents_dim,
        settings.language_input,
        _earlier_tokenizer(run) if run else None,
    )


def _earlier_tokenizer(run: RunConfig) -> Tokenizer | None:
    """The tokenizer of the language model in the workdir, or else in `init_from`."""
    saved = checkpoint.read_newest(storage.to_path(run.workdir), language_models.load_config)
    if saved is None and run.init_from:
        saved = language_models.load_config(checkpoint.find_checkpoint(run.init_from))
    return saved and saved[1]


def start_params(
    settings: TextSettings,
    config: LanguageConfig,
    tokenizer: Tokenizer,
    init_from: str,
    shapes: Any,
    say: Say,
) -> tuple[Any | None, bool]:
    """Initial weights of the language model, or None; and whether they are from `init_from`.

    If `init_from` has the same language model, its weights have priority over published ones. If it
    has another one, a line says that it is not used.
    """
    if init_from:
        folder = checkpoint.find_checkpoint(init_from)
        saved = language_models.load_config(folder)
        if saved is not None:
            saved_config, saved_tokenizer = saved
            if saved_config == config and saved_tokenizer.json == tokenizer.json:
                return checkpoints.load_folder(init_from, FOLDER, shapes), True
            difference = "size or input" if saved_config != config else "tokenizer"
            say(f"the language model of {init_from} is not used: it has another {difference}")
    params = language_models.start(settings.language_model, config)
    if params is None:
        return None, False
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    return sharding.whole(params, shardings), False


def check_texts(
    settings: TextSettings,
    mixture: sources.Mixture | None,
    tokenizer: Tokenizer,
    segment_seconds: float,
    say: Say,
) -> None:
    """Prints how many texts are used.

    Texts in shards are not counted, because this would read all shards.

    Raises:
      ValueError: There is no text to learn from.
    """
    all_sources = mixture.sources if mixture else ()
    limit = settings.max_text_tokens
    num_used = 0
    num_texts = 0
    for source in all_sources:
        if not isinstance(source, sources.FileSource):
            return
        num_texts += len(source.texts(math.inf))
        for text in source.texts(segment_seconds):
            num_used += len(tokenizer.encode(text)) <= limit
    if not num_used:
        raise ValueError(
            f"train_data has no recording of at most segment_seconds {segment_seconds:.3g} with a "
            f"text of at most max_text_tokens {limit} for language_model to learn"
        )
    say(
        f"{num_used} of {num_texts} texts are used: no longer than max_text_tokens "
        f"{limit}, of recordings no longer than {segment_seconds:.3g} s"
    )
