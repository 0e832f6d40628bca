"""Text from audio: generation with a cache of keys and values, jitted and batched."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from moss_tok import summary
from moss_tok.audio.manifest import TASKS
from moss_tok.codec.checks import check_codes, check_part, check_recordings, check_wav
from moss_tok.codec.inference import (
    Codec,
    bucket_frames,
    encode,
    prefix_mask,
    stack,
    valid_mask,
    zero_past,
)
from moss_tok.errors import check_choice
from moss_tok.language.config import LanguageConfig
from moss_tok.language.model import SemanticHead, empty_cache
from moss_tok.language.text import Tokenizer
from moss_tok.nn.cache import Span
from moss_tok.nn.compute import ComputeConfig

_BATCH = 16  # recordings that are transcribed at once


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
      temperature: 0: always the likeliest.
      top_k: Only among so many of the likeliest; 0: all.
      top_p: Only among the likeliest that make up this probability, of those that top_k leaves.
      max_tokens: A text ends here at the latest.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 512

    def __post_init__(self):
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature must be 0..100, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 1 <= self.max_tokens <= 65536:
            raise ValueError(f"max_tokens must be 1..65536, got {self.max_tokens}")


@flax.struct.dataclass
class Language:
    """A semantic head ready to use: a pytree whose configs are static.

    Attributes:
      params: Of `SemanticHead`, float32.
      config: What it is.
      tokenizer: For its texts.
      compute: How it is computed.
    """

    params: Any
    config: LanguageConfig = flax.struct.field(pytree_node=False)
    tokenizer: Tokenizer = flax.struct.field(pytree_node=False)
    compute: ComputeConfig = flax.struct.field(pytree_node=False, default=ComputeConfig())

    def __repr__(self) -> str:
        parts = [type(self.config).__name__]
        if isinstance(self.config, LanguageConfig):
            layers = summary.count(self.config.num_layers, "layer")
            parts = [
                f"{layers} of {self.config.model_dim}",
                f"vocabulary of {self.config.vocab_size}",
                f"hears {self.config.audio}",
            ]
        return f"Language({', '.join(parts)}, {summary.count_parameters(self.params)})"

    def apply(self, *args: Any, method: str | None = None) -> Any:
        """Calls a method of the head with `params`."""
        head = SemanticHead(self.config, self.compute)
        return head.apply({"params": self.params}, *args, method=method)


def transcribe(
    codec: Codec,
    language: Language,
    codes: np.ndarray,
    lengths: np.ndarray | None = None,
    task: str = "transcribe",
    sampling: Sampling = Sampling(),
    seed: int = 0,
    num_quantizers: int | None = None,
) -> list[str]:
    """Texts of audio that is given as codes.

    Args:
      codec: The codec the codes are of; its quantizer is enough.
      language: Trained on that codec's codes.
      codes: [B, q, T] integers in [0, codebook_size), of the first q quantizers.
      lengths: [B] valid frames; default: all T.
      task: One of TASKS.
      sampling: How tokens are chosen.
      seed: For it, where the temperature is above 0.
      num_quantizers: Only the first of the q are heard, by the same program; default: all.

    Returns:
      B texts.

    Raises:
      ValueError: An unknown task, wrong shapes, types or values (see `moss_tok`), or a language
        model that was trained on unquantized latents.
    """
    if language.config.audio != "codes":
        raise ValueError("this language model hears latents, not codes: give it audio")
    size = codec.config.quantizer.codebook_size
    codes, lengths = check_codes(codes, ("B", "Q", "T"), size, lengths)
    most = codec.config.check_num_quantizers(codes.shape[1])
    if num_quantizers is not None and not 1 <= num_quantizers <= most:
        raise ValueError(f"num_quantizers must be 1..{most}, got {num_quantizers}")
    padding = bucket_frames(codes.shape[-1]) - codes.shape[-1]
    codes = np.pad(np.asarray(codes), ((0, 0), (0, 0), (0, padding)))
    latents = _quantized(codec, codes, num_quantizers or most)
    return _write(language, latents, lengths, task, sampling, seed)


def transcribe_codes(
    codec: Codec,
    language: Language,
    codes: Sequence[np.ndarray],
    num_quantizers: int | None = None,
    **options: Any,
) -> list[str]:
    """`transcribe` of recordings [q, T], in batches of about the same length."""

    def read(batch: np.ndarray, lengths: np.ndarray) -> list[str]:
        options_ = options | {"num_quantizers": num_quantizers}
        return transcribe(codec, language, batch, lengths, **options_)

    codes = check_recordings("codes", codes, ("Q", "T"))
    return _in_batches(codes, 1, read)


def transcribe_wavs(
    codec: Codec,
    language: Language,
    wavs: Sequence[np.ndarray],
    num_quantizers: int | None = None,
    task: str = "transcribe",
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> list[str]:
    """Texts of recordings [C, S], in batches of about the same length.

    Args:
      codec: With its encoder.
      language: What listens.
      wavs: At the codec's rate, with its channels.
      num_quantizers: Only the first of them are heard; default: all.
      task: One of TASKS.
      sampling: How tokens are chosen.
      seed: For it.
    """

    def read(batch: np.ndarray, lengths: np.ndarray) -> list[str]:
        heard = hear(codec, language, batch, lengths, num_quantizers)
        return _write(language, *heard, task, sampling, seed)

    wavs = check_recordings("wav", wavs, (codec.config.num_channels, "S"))
    return _in_batches(wavs, codec.config.hop_length, read)


def _in_batches(
    recordings: Sequence[np.ndarray], unit: int, read: Callable[[np.ndarray, np.ndarray], list[str]]
) -> list[str]:
    """Calls `read` (batch [B, *, size], lengths [B]) for recordings [*, S], `unit` of S a frame."""
    texts = [""] * len(recordings)
    sizes = [bucket_frames(-(-x.shape[-1] // unit)) * unit for x in recordings]
    for size in sorted(set(sizes)):
        members = [i for i, s in enumerate(sizes) if s == size]
        most = _BATCH if len(members) > 1 else 1  # two shapes for each size
        for start in range(0, len(members), _BATCH):
            rows = members[start : start + _BATCH]
            padded = rows + rows[:1] * (most - len(rows))
            lengths = np.array([recordings[i].shape[-1] for i in padded], np.int32)
            batch = stack([recordings[i] for i in padded], size)
            for i, text in zip(rows, read(batch, lengths), strict=False):
                texts[i] = text
    return texts


def hear(
    codec: Codec,
    language: Language,
    wav: np.ndarray,
    lengths: np.ndarray,
    num_quantizers: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What the language model hears of audio [B, C, S], [B]: frames [B, T, D] and their number."""
    most = codec.config.check_num_quantizers(num_quantizers)
    if language.config.audio == "codes":
        codes, frames = encode(codec, wav, lengths)  # all: one program for every number
        return _quantized(codec, codes, most), frames
    check_part(codec, "encoder")
    wav, lengths = check_wav(wav, ("B", codec.config.num_channels, "S"), lengths)
    return _latents(codec, wav, lengths), codec.config.num_frames(lengths)


def _write(
    language: Language,
    latents: jax.Array,
    lengths: jax.Array,
    task: str,
    sampling: Sampling,
    seed: int,
) -> list[str]:
    """Texts of frames [B, T, D] as `hear` gives them."""
    check_choice("task", task, TASKS)
    tasks = jnp.full(len(latents), TASKS.index(task))
    tokens, sizes = generate(language, latents, lengths, tasks, jax.random.key(seed), sampling)
    rows = zip(np.asarray(tokens), np.asarray(sizes), strict=True)
    return [language.tokenizer.decode(row[:size].tolist()) for row, size in rows]


@jax.jit
def _latents(codec: Codec, wav: jax.Array, lengths: jax.Array) -> jax.Array:
    return codec.apply(zero_past(wav, lengths), method="latents")


@jax.jit
def _quantized(codec: Codec, codes: jax.Array, num_quantizers: int) -> jax.Array:
    keep = prefix_mask(codes, num_quantizers)
    return codec.apply(codes, keep, method="dequantize")


@functools.partial(jax.jit, static_argnames="sampling")
def generate(
    language: Language,
    latents: jax.Array,
    lengths: jax.Array,
    tasks: jax.Array,
    key: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
    """Tokens that follow audio.

    Args:
      language: The head.
      latents: [B, T, D]; what lies past the lengths changes nothing.
      lengths: [B] valid frames.
      tasks: [B] indices into TASKS.
      key: For temperatures above 0.
      sampling: How tokens are chosen.

    Returns:
      [B, max_tokens] int32, zero past the lengths, and the lengths [B]; the end is not counted.
    """
    batch, most, end = len(latents), sampling.max_tokens, language.config.end_id
    latents = jnp.where(valid_mask(latents.shape[1], lengths)[..., None], latents, 0)
    prompt = language.apply(latents, tasks, method="prompt")
    cache = empty_cache(language.config, language.compute, batch, prompt.shape[1] + most)
    span = Span(jnp.zeros(batch, jnp.int32), 1 + lengths)
    _, cache = language.apply(prompt, cache, span, method="extend")

    def unfinished(carry):
        number, _, done, _, _ = carry
        return (number < most) & ~done.all()

    def step(carry):
        number, last, done, cache, tokens = carry
        span = Span(1 + lengths + number, jnp.ones(batch, jnp.int32))
        logits, cache = language.apply(last, cache, span, method="next_logits")
        chosen = choose(logits, jax.random.fold_in(key, number), sampling)
        done |= chosen == end
        tokens = tokens.at[:, number].set(jnp.where(done, -1, chosen))
        return number + 1, chosen, done, cache, tokens

    start = (0, jnp.full(batch, end), jnp.zeros(batch, bool), cache)
    *_, tokens = jax.lax.while_loop(
        unfinished, step, (*start, jnp.full((batch, most), -1, jnp.int32))
    )
    sizes = (tokens >= 0).sum(-1)
    return jnp.maximum(tokens, 0), sizes


def choose(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """A token [B] for each row of logits [B, V]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    order = jnp.argsort(-logits, axis=-1)
    logits = jnp.take_along_axis(logits, order, axis=-1) / sampling.temperature
    if sampling.top_k:
        most = min(sampling.top_k, logits.shape[-1])
        logits = jnp.where(jnp.arange(logits.shape[-1]) < most, logits, -jnp.inf)
    share = jax.nn.softmax(logits, axis=-1)
    kept = jnp.cumsum(share, axis=-1) - share < sampling.top_p  # the likeliest always
    place = jax.random.categorical(key, jnp.where(kept, logits, -jnp.inf), axis=-1)
    return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0].astype(jnp.int32)
