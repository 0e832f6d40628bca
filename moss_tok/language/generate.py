"""Generates text from audio, in jitted batches with a key-value cache."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from moss_tok import summary
from moss_tok.audio.manifest import TASKS
from moss_tok.batching import batch_by_shape
from moss_tok.codec.checks import check_codes, check_part, check_recordings, check_wav
from moss_tok.codec.inference import Codec, bucket_frames, encode, stack
from moss_tok.codec.masks import prefix_mask, valid_mask, zero_past
from moss_tok.errors import check_choice
from moss_tok.language.config import LanguageConfig
from moss_tok.language.model import SemanticHead, empty_cache
from moss_tok.language.text import Tokenizer
from moss_tok.nn.cache import Span
from moss_tok.nn.compute import ComputeConfig

_BATCH_SIZE = 16  # recordings that are transcribed at once
_MIN_FRAMES = 32  # padding to this length costs less than to compile more programs


@dataclasses.dataclass(frozen=True)
class Choice:
    """How `choose` chooses a token.

    Attributes:
      temperature: Sampling temperature; 0 always chooses the most likely token.
      top_k: Number of most likely tokens to sample among; 0: all.
      top_p: Of these tokens, sample among the most likely ones that together have this probability.

    Raises:
      ValueError: A value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature must be 0..100, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


@dataclasses.dataclass(frozen=True)
class Sampling(Choice):
    """How the tokens of a text are sampled.

    Attributes:
      max_tokens: Largest number of tokens in a text.

    Raises:
      ValueError: A value is out of range.
    """

    max_tokens: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.max_tokens <= 65536:
            raise ValueError(f"max_tokens must be 1..65536, got {self.max_tokens}")


@flax.struct.dataclass
class Language:
    """A language model with its parameters, as `moss_tok.language.load` returns it.

    It is a pytree with static configs, so it can be an argument of functions under `jax.jit`.

    Attributes:
      params: Parameters of `SemanticHead`, float32.
      config: Architecture of the model.
      tokenizer: Tokenizer of its texts.
      compute: How the model is computed: types, precision, attention.
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
                f"input: {self.config.audio}",
            ]
        return f"Language({', '.join(parts)}, {summary.count_parameters(self.params)})"

    def apply(self, *args: Any, method: str | None = None) -> Any:
        """Calls the method `method` of `SemanticHead` with `params`."""
        head = SemanticHead(self.config, self.compute)
        return head.apply({"params": self.params}, *args, method=method)


def transcribe(
    codec: Codec,
    language: Language,
    codes: ArrayLike,
    lengths: ArrayLike | None = None,
    task: str = "transcribe",
    sampling: Sampling = Sampling(),
    seed: int = 0,
    num_quantizers: int | None = None,
) -> list[str]:
    """Transcribes a batch of audio that is given as codes.

        codec = moss_tok.load(path, component="quantizer")
        language = moss_tok.language.load(path)
        texts = moss_tok.language.transcribe(codec, language, codes)

    Args:
      codec: The codec that made the codes; it needs its quantizer only.
      language: A language model trained on codes of that codec.
      codes: [B, q, T] integers in [0, codebook_size), of the first q quantizers.
      lengths: [B] integers, valid frames of each item; default: all T.
      task: One of TASKS.
      sampling: How tokens are sampled.
      seed: Random seed for a temperature above 0.
      num_quantizers: Use only the first 1..q quantizers, with the same compiled program; default:
        all q.

    Returns:
      B texts.

    Raises:
      ValueError: The task is unknown, an argument has the wrong shape, type or values (see
        `moss_tok`), or the language model takes latents before the quantizer.
    """
    if language.config.audio != "codes":
        raise ValueError("this language model takes latents, not codes: use transcribe_wavs")
    codebook_size = codec.config.quantizer.codebook_size
    array, sizes = check_codes(codes, ("B", "Q", "T"), codebook_size, lengths)
    limit = codec.config.check_num_quantizers(array.shape[1])
    if num_quantizers is not None and not 1 <= num_quantizers <= limit:
        raise ValueError(f"num_quantizers must be 1..{limit}, got {num_quantizers}")
    padding = _padded_frames(array.shape[-1]) - array.shape[-1]
    padded = np.pad(np.asarray(array), ((0, 0), (0, 0), (0, padding)))
    latents = _quantized_latents(codec, padded, num_quantizers or limit)
    return _generate_texts(language, latents, sizes, task, sampling, seed)


def transcribe_codes(
    codec: Codec,
    language: Language,
    codes: Sequence[ArrayLike],
    num_quantizers: int | None = None,
    **options: Any,
) -> list[str]:
    """Transcribes recordings that are given as codes, in batches of similar length.

    Args:
      codec: The codec that made the codes; it needs its quantizer only.
      language: A language model trained on codes of that codec.
      codes: Codes [q, T] of each recording.
      num_quantizers: Use only the first 1..q quantizers; default: all q.
      **options: task, sampling and seed of `transcribe`.

    Returns:
      A text per recording.

    Raises:
      ValueError: As `transcribe`.
    """

    def transcribe_batch(batch: np.ndarray, lengths: np.ndarray) -> list[str]:
        return transcribe(codec, language, batch, lengths, num_quantizers=num_quantizers, **options)

    arrays = check_recordings("codes", codes, ("Q", "T"))
    return _in_batches(arrays, 1, transcribe_batch)


def transcribe_wavs(
    codec: Codec,
    language: Language,
    wavs: Sequence[ArrayLike],
    num_quantizers: int | None = None,
    task: str = "transcribe",
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> list[str]:
    """Transcribes recordings of audio, in batches of similar length.

    Args:
      codec: A codec with its encoder.
      language: A language model trained with that codec.
      wavs: Audio [C, S] of each recording at `codec.config.sample_rate`, in [-1, 1].
      num_quantizers: Use only the codes of the first 1..Q quantizers; default: all.
      task: One of TASKS.
      sampling: How tokens are sampled.
      seed: Random seed for a temperature above 0.

    Returns:
      A text per recording.

    Raises:
      ValueError: The task is unknown, or a recording has the wrong shape, type or values (see
        `moss_tok`).
    """

    def transcribe_batch(batch: np.ndarray, lengths: np.ndarray) -> list[str]:
        latents, num_frames = input_latents(codec, language, batch, lengths, num_quantizers)
        return _generate_texts(language, latents, num_frames, task, sampling, seed)

    arrays = check_recordings("wav", wavs, (codec.config.num_channels, "S"))
    return _in_batches(arrays, codec.config.hop_length, transcribe_batch)


def _in_batches(
    recordings: Sequence[np.ndarray | jax.Array],
    unit: int,
    transcribe_batch: Callable[[np.ndarray, np.ndarray], list[str]],
) -> list[str]:
    """Transcribes recordings in batches of few shapes.

    Args:
      recordings: Arrays [*, S].
      unit: Entries of S in one frame.
      transcribe_batch: (batch [B, *, size], lengths [B]) -> B texts.

    Returns:
      A text per recording, in their order.
    """
    sizes = []
    for recording in recordings:
        num_frames = -(-recording.shape[-1] // unit)
        sizes.append(_padded_frames(num_frames) * unit)
    texts = [""] * len(recordings)
    for size, rows, padded_rows in batch_by_shape(sizes, _BATCH_SIZE):
        batch = [recordings[row] for row in padded_rows]
        lengths = np.array([recording.shape[-1] for recording in batch], np.int32)
        batch_texts = transcribe_batch(stack(batch, size), lengths)
        for row, text in zip(rows, batch_texts, strict=False):
            texts[row] = text
    return texts


def _padded_frames(num_frames: int) -> int:
    """The length that audio is padded to, so that few programs are compiled."""
    return bucket_frames(max(num_frames, _MIN_FRAMES))


def input_latents(
    codec: Codec,
    language: Language,
    wav: ArrayLike,
    lengths: ArrayLike,
    num_quantizers: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The language model's input for audio [B, C, S]: latents [B, T, D], and valid frames [B]."""
    num_quantizers = codec.config.check_num_quantizers(num_quantizers)
    if language.config.audio == "codes":
        # All quantizers are computed, so that one program serves every num_quantizers.
        codes, num_frames = encode(codec, wav, lengths)
        return _quantized_latents(codec, codes, num_quantizers), num_frames
    check_part(codec, "encoder")
    array, sizes = check_wav(wav, ("B", codec.config.num_channels, "S"), lengths)
    return _latents(codec, array, sizes), codec.config.num_frames(sizes)


def _generate_texts(
    language: Language,
    latents: jax.Array,
    lengths: jax.Array,
    task: str,
    sampling: Sampling,
    seed: int,
) -> list[str]:
    """Texts for the results of `input_latents`."""
    check_choice("task", task, TASKS)
    tasks = jnp.full(len(latents), TASKS.index(task))
    tokens, sizes = generate(language, latents, lengths, tasks, jax.random.key(seed), sampling)
    texts = []
    for row, size in zip(np.asarray(tokens), np.asarray(sizes), strict=True):
        texts.append(language.tokenizer.decode(row[:size].tolist()))
    return texts


@jax.jit
def _latents(codec: Codec, wav: jax.Array, lengths: jax.Array) -> jax.Array:
    return codec.apply(zero_past(wav, lengths), method="latents")


@jax.jit
def _quantized_latents(
    codec: Codec, codes: jax.Array | np.ndarray, num_quantizers: int
) -> jax.Array:
    mask = prefix_mask(codes, num_quantizers)
    return codec.apply(codes, mask, method="dequantize")


@functools.partial(jax.jit, static_argnames="sampling")
def generate(
    language: Language,
    latents: jax.Array,
    lengths: jax.Array,
    tasks: jax.Array,
    key: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
    """Generates the text tokens that follow audio.

    Args:
      language: The language model.
      latents: [B, T, D]; entries past the lengths have no effect.
      lengths: [B] valid frames.
      tasks: [B] indices into TASKS.
      key: Random key for a temperature above 0.
      sampling: How tokens are sampled.

    Returns:
      Tokens [B, max_tokens] int32, zero past their lengths, and the lengths [B], which do not count
      the end token.
    """
    batch = len(latents)
    max_tokens = sampling.max_tokens
    end = language.config.end_id
    is_valid = valid_mask(latents.shape[1], lengths)
    latents = jnp.where(is_valid[..., None], latents, 0)
    prompt = language.apply(latents, tasks, method="prompt")
    cache = empty_cache(language.config, language.compute, batch, prompt.shape[1] + max_tokens)
    span = Span(jnp.zeros(batch, jnp.int32), 1 + lengths)
    _, cache = language.apply(prompt, cache, span, method="extend")

    def is_unfinished(carry: Any) -> jax.Array:
        number, _, done, _, _ = carry
        return (number < max_tokens) & ~done.all()

    def step(carry: Any) -> Any:
        number, last, done, cache, tokens = carry
        span = Span(1 + lengths + number, jnp.ones(batch, jnp.int32))
        logits, cache = language.apply(last, cache, span, method="next_logits")
        chosen = choose(logits, jax.random.fold_in(key, number), sampling)
        done |= chosen == end
        tokens = tokens.at[:, number].set(jnp.where(done, -1, chosen))
        return number + 1, chosen, done, cache, tokens

    last = jnp.full(batch, end)
    done = jnp.zeros(batch, bool)
    tokens = jnp.full((batch, max_tokens), -1, jnp.int32)
    carry = (0, last, done, cache, tokens)
    *_, tokens = jax.lax.while_loop(is_unfinished, step, carry)
    sizes = (tokens >= 0).sum(-1)
    return jnp.maximum(tokens, 0), sizes


def choose(logits: jax.Array, key: jax.Array, sampling: Choice) -> jax.Array:
    """Samples a token [B] for each row of logits [B, V]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    order = jnp.argsort(-logits, axis=-1)
    logits = jnp.take_along_axis(logits, order, axis=-1) / sampling.temperature
    if sampling.top_k:
        top_k = min(sampling.top_k, logits.shape[-1])  # it may exceed int32
        is_likely = jnp.arange(logits.shape[-1]) < top_k
        logits = jnp.where(is_likely, logits, -jnp.inf)
    probabilities = jax.nn.softmax(logits, axis=-1)
    # The probability of all more likely tokens; 0 for the first one, which always passes.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    logits = jnp.where(before < sampling.top_p, logits, -jnp.inf)
    rank = jax.random.categorical(key, logits, axis=-1)
    tokens = jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32)
