"""The jitted steps of generation, with caches for both Transformers.

Sampling is a function of the seed, the number of an item and the number of a frame, so neither the
batch nor the size of blocks changes a result.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from moss_tok import summary
from moss_tok.language.text import Tokenizer
from moss_tok.nn.blocks import empty_cache
from moss_tok.nn.cache import Cache, Span
from moss_tok.nn.compute import ComputeConfig
from moss_tok.speech.config import SpeechConfig
from moss_tok.speech.model import SpeechModel
from moss_tok.speech.sampling import Channel, Sampling, choose_each, penalize

BLOCK_FRAMES = 16  # frames that one call samples at most


@flax.struct.dataclass
class Speech:
    """A speech model with its parameters, as `moss_tok.speech.load` returns it.

    It is a pytree with static configs, so it can be an argument of functions under `jax.jit`.

    Attributes:
      params: Parameters of `SpeechModel`, float32.
      config: Architecture and layout of the model.
      tokenizer: Tokenizer of its texts.
      compute: How the model is computed: types, precision, attention.
    """

    params: Any
    config: SpeechConfig = flax.struct.field(pytree_node=False)
    tokenizer: Tokenizer = flax.struct.field(pytree_node=False)
    compute: ComputeConfig = flax.struct.field(pytree_node=False, default=ComputeConfig())

    def __repr__(self) -> str:
        layers = summary.count(self.config.temporal.num_layers, "layer")
        parts = [
            f"{layers} of {self.config.temporal.model_dim}",
            summary.count(self.config.num_quantizers, "quantizer"),
            f"{self.config.layout} layout",
        ]
        return f"Speech({', '.join(parts)}, {summary.count_parameters(self.params)})"

    def apply(self, *args: Any, method: Any) -> Any:
        """Calls a method of `SpeechModel` with `params`."""
        model = SpeechModel(self.config, self.compute)
        return model.apply({"params": self.params}, *args, method=method)


@flax.struct.dataclass
class State:
    """Sequences that are being generated.

    Attributes:
      hidden: [B, D], temporal state of the last position.
      cache: Keys and values of the temporal Transformer.
      position: [B], positions so far.
      num_frames: [B], frames sampled so far.
      limit: [B], longest speech in frames.
      ended: bool [B], speech that the text channel has ended.
      seen: bool [B, Q, K + 1], codes that each channel has had.
      keys: [B] random keys.
    """

    hidden: jax.Array
    cache: Cache
    position: jax.Array
    num_frames: jax.Array
    limit: jax.Array
    ended: jax.Array
    seen: jax.Array
    keys: jax.Array

    @property
    def done(self) -> jax.Array:
        """Sequences without a next frame, bool [B]."""
        return self.ended | (self.num_frames >= self.limit)


@functools.partial(jax.jit, static_argnames="cache_size")
def begin(
    speech: Speech,
    text: jax.Array,
    codes: jax.Array,
    lengths: jax.Array,
    limits: jax.Array,
    keys: jax.Array,
    num_quantizers: int | jax.Array,
    cache_size: int,
) -> State:
    """The state after prompts.

    Args:
      speech: The model.
      text: [B, T] tokens.
      codes: [B, Q, T]; K where there is none, and past the lengths.
      lengths: [B] valid positions.
      limits: [B], longest speech in frames.
      keys: [B] random keys.
      num_quantizers: Quantizers in use.
      cache_size: Positions that the cache holds: those of the prompt and of the longest speech.
    """
    c = speech.config
    batch = len(text)
    x = speech.apply(text, codes, _in_use(c, batch, num_quantizers), method="embed")
    cache = empty_cache(c.temporal.block, c.temporal.num_layers, speech.compute, batch, cache_size)
    span = Span(jnp.zeros(batch, jnp.int32), lengths)
    states, cache = speech.apply(x, cache, span, method="temporal_states")
    hidden = jnp.take_along_axis(states, (lengths - 1)[:, None, None], axis=1)[:, 0]
    seen = jnp.zeros((batch, c.num_quantizers, c.codebook_size + 1), bool)
    row = jnp.arange(batch)[:, None, None]
    level = jnp.arange(c.num_quantizers)[:, None]
    return State(
        hidden=hidden,
        cache=cache,
        position=lengths,
        num_frames=jnp.zeros(batch, jnp.int32),
        limit=limits,
        ended=jnp.zeros(batch, bool),
        seen=seen.at[row, level, codes].set(True),
        keys=keys,
    )


@functools.partial(jax.jit, static_argnames="sampling", donate_argnames="state")
def sample_frames(
    speech: Speech,
    state: State,
    num_quantizers: int | jax.Array,
    num_frames: int | jax.Array,
    sampling: Sampling,
) -> tuple[State, jax.Array, jax.Array]:
    """Samples the next frames, fewer where speech ends.

    Args:
      speech: The model.
      state: Donated.
      num_quantizers: Quantizers in use.
      num_frames: At most 16.
      sampling: How codes are sampled.

    Returns:
      The state, codes [B, Q, 16] of which the first `num_quantizers` and `counts` are valid, and
      counts [B].
    """
    batch = len(state.limit)
    shape = (batch, speech.config.num_quantizers, BLOCK_FRAMES)
    first = state.num_frames

    def is_unfinished(carry: Any) -> jax.Array:
        number, state, _ = carry
        return (number < num_frames) & ~state.done.all()

    def step(carry: Any) -> Any:
        number, state, codes = carry
        state, frame = _sample_frame(speech, state, num_quantizers, sampling)
        return number + 1, state, codes.at[:, :, number].set(frame)

    carry = (0, state, jnp.zeros(shape, jnp.int32))
    _, state, codes = jax.lax.while_loop(is_unfinished, step, carry)
    return state, codes, state.num_frames - first


def _sample_frame(
    speech: Speech, state: State, num_quantizers: int | jax.Array, sampling: Sampling
) -> tuple[State, jax.Array]:
    """The state after one frame, and its codes [B, Q]; sequences that are done do not change."""
    c = speech.config
    batch = len(state.limit)
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.num_frames)
    ends, codes = _sample_channels(speech, state, keys, num_quantizers, sampling)
    ended = state.ended | (~state.done & ends)
    goes_on = ~state.done & ~ends
    slot = jnp.full((batch, 1), c.slot_id)
    in_use = _in_use(c, batch, num_quantizers)
    x = speech.apply(slot, codes[..., None], in_use, method="embed")
    span = Span(state.position, goes_on.astype(jnp.int32))
    states, cache = speech.apply(x, state.cache, span, method="temporal_states")
    level = jnp.arange(c.num_quantizers)
    seen = state.seen.at[jnp.arange(batch)[:, None], level, codes].set(True)
    state = dataclasses.replace(
        state,
        hidden=states[:, 0],
        cache=cache,
        position=state.position + goes_on,
        num_frames=state.num_frames + goes_on,
        ended=ended,
        seen=seen,
    )
    return state, codes


def _sample_channels(
    speech: Speech,
    state: State,
    keys: jax.Array,
    num_quantizers: int | jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
    """Whether speech ends, bool [B], and the codes [B, Q] of the next frame; K above the first."""
    c = speech.config
    batch = len(state.limit)
    cache = empty_cache(c.depth.block, c.depth.num_layers, speech.compute, batch, c.num_channels)

    def extend(channel: int | jax.Array, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """From the input [B, D] of a channel to its states [B, D]."""
        span = Span(jnp.full(batch, channel), jnp.ones(batch, jnp.int32))
        x = x[:, None].astype(speech.compute.dtype)
        depth, cache = speech.apply(x, cache, span, method="depth_states")
        channels = jnp.asarray(channel)[None]
        states = speech.apply(depth, channels, method=lambda m, x, c: m.out.states(x, c))
        return states, cache

    def sample(
        level: int | jax.Array, x: jax.Array, cache: Cache, codes: jax.Array, group: Channel
    ) -> tuple[jax.Array, Cache, jax.Array]:
        """Adds the code of a quantizer; returns the next channel's input."""
        states, cache = extend(level + 1, x, cache)
        levels = jnp.asarray(level)[None]
        logits = speech.apply(states, levels, method=lambda m, x, q: m.out.code_logits(x, q))[:, 0]
        logits = logits.at[:, c.codebook_size].set(-jnp.inf)
        logits = penalize(logits, state.seen[:, level], group)
        level_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, level + 1)
        code = choose_each(logits, level_keys, group)
        x = speech.params["code_embeddings"][level, code]
        return x, cache, codes.at[:, level].set(code)

    states, cache = extend(0, state.hidden, cache)
    tokens = jnp.array([c.slot_id, c.end_id])
    logits = speech.apply(states[:, 0], tokens, method=lambda m, x, t: m.out.text_logits(x, t))
    # Speech has at least one frame.
    logits = jnp.where((state.num_frames == 0)[:, None] & (tokens == c.end_id), -jnp.inf, logits)
    text_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
    ends = choose_each(logits, text_keys, sampling.text) == 1

    x = jnp.broadcast_to(speech.params["text_embedding"][c.slot_id], state.hidden.shape)
    codes = jnp.full((batch, c.num_quantizers), c.codebook_size, jnp.int32)
    carry = sample(0, x, cache, codes, sampling.first)

    def step(level: jax.Array, carry: Any) -> Any:
        x, cache, codes = carry
        return sample(level, x, cache, codes, sampling.others)

    *_, codes = jax.lax.fori_loop(1, num_quantizers, step, carry)
    return ends, codes


def _in_use(config: SpeechConfig, batch: int, num_quantizers: int | jax.Array) -> jax.Array:
    """The quantizers in use, bool [B, Q]."""
    used = jnp.arange(config.num_quantizers) < num_quantizers
    return jnp.broadcast_to(used, (batch, config.num_quantizers))
