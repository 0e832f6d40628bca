"""The jitted steps of generation, with caches for both Transformers.

What is sampled depends on the seed, the number of the item and the number of the frame. It does not
depend on the other items of the batch or on the size of blocks.
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

BLOCK_FRAMES = 16  # largest number of frames that one call samples


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
      max_frames: [B], frames after which speech is cut.
      ended: bool [B], whether the text channel has ended the speech.
      seen: bool [B, Q, K + 1], codes that each quantizer has had.
      keys: [B] random keys.
    """

    hidden: jax.Array
    cache: Cache
    position: jax.Array
    num_frames: jax.Array
    max_frames: jax.Array
    ended: jax.Array
    seen: jax.Array
    keys: jax.Array

    @property
    def done(self) -> jax.Array:
        """Sequences without a next frame, bool [B]."""
        return self.ended | (self.num_frames >= self.max_frames)


@functools.partial(jax.jit, static_argnames="cache_size")
def begin(
    speech: Speech,
    text: jax.Array,
    codes: jax.Array,
    lengths: jax.Array,
    max_frames: jax.Array,
    keys: jax.Array,
    num_quantizers: int | jax.Array,
    cache_size: int,
) -> State:
    """The state after prompts.

    Args:
      speech: The model.
      text: [B, T] tokens.
      codes: [B, Q, T]; K where there is no code, and past the lengths.
      lengths: [B] valid positions.
      max_frames: [B], frames after which speech is cut.
      keys: [B] random keys.
      num_quantizers: Quantizers in use.
      cache_size: Positions of the cache, at least those of the prompt and `max_frames` together.
    """
    config = speech.config
    temporal = config.temporal
    batch = len(text)
    in_use = _quantizers_in_use(config, batch, num_quantizers)
    x = speech.apply(text, codes, in_use, method="embed")
    cache = empty_cache(temporal.block, temporal.num_layers, speech.compute, batch, cache_size)
    span = Span(jnp.zeros(batch, jnp.int32), lengths)
    states, cache = speech.apply(x, cache, span, method="temporal_states")
    hidden = jnp.take_along_axis(states, (lengths - 1)[:, None, None], axis=1)[:, 0]
    seen = jnp.zeros((batch, config.num_quantizers, config.codebook_size + 1), bool)
    rows = jnp.arange(batch)[:, None, None]
    levels = jnp.arange(config.num_quantizers)[:, None]
    return State(
        hidden=hidden,
        cache=cache,
        position=lengths,
        num_frames=jnp.zeros(batch, jnp.int32),
        max_frames=max_frames,
        ended=jnp.zeros(batch, bool),
        seen=seen.at[rows, levels, codes].set(True),
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
    """Samples the next frames; fewer of a sequence that ends.

    Args:
      speech: The model.
      state: The sequences so far; donated.
      num_quantizers: Quantizers in use.
      num_frames: 1..16 frames to sample.
      sampling: How codes are sampled.

    Returns:
      The state, codes [B, Q, 16], and the number of new frames of each sequence, counts [B]. Only
      the first `num_quantizers` quantizers and the first `counts` frames are valid.
    """
    batch = len(state.max_frames)
    shape = (batch, speech.config.num_quantizers, BLOCK_FRAMES)
    num_frames_before = state.num_frames

    def is_unfinished(carry: Any) -> jax.Array:
        frame, state, _ = carry
        return (frame < num_frames) & ~state.done.all()

    def step(carry: Any) -> Any:
        frame, state, codes = carry
        state, frame_codes = sample_frame(speech, state, num_quantizers, sampling)
        return frame + 1, state, codes.at[:, :, frame].set(frame_codes)

    carry = (0, state, jnp.zeros(shape, jnp.int32))
    _, state, codes = jax.lax.while_loop(is_unfinished, step, carry)
    return state, codes, state.num_frames - num_frames_before


def sample_frame(
    speech: Speech, state: State, num_quantizers: int | jax.Array, sampling: Sampling
) -> tuple[State, jax.Array]:
    """Samples one frame, by both Transformers.

    Args:
      speech: The model.
      state: The sequences so far. Those that are done get no more frames, and their `hidden` and
        `seen` are not valid any more.
      num_quantizers: Quantizers in use.
      sampling: How codes are sampled.

    Returns:
      The state after the frame, and its codes [B, Q].
    """
    config = speech.config
    batch = len(state.max_frames)
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.num_frames)
    ends, codes = sample_channels(speech, state, keys, num_quantizers, sampling)
    ended = state.ended | (~state.done & ends)
    continues = ~state.done & ~ends
    slot = jnp.full((batch, 1), config.slot_id)
    in_use = _quantizers_in_use(config, batch, num_quantizers)
    x = speech.apply(slot, codes[..., None], in_use, method="embed")
    span = Span(state.position, continues.astype(jnp.int32))
    states, cache = speech.apply(x, state.cache, span, method="temporal_states")
    levels = jnp.arange(config.num_quantizers)
    seen = state.seen.at[jnp.arange(batch)[:, None], levels, codes].set(True)
    state = dataclasses.replace(
        state,
        hidden=states[:, 0],
        cache=cache,
        position=state.position + continues,
        num_frames=state.num_frames + continues,
        ended=ended,
        seen=seen,
    )
    return state, codes


def sample_channels(
    speech: Speech,
    state: State,
    keys: jax.Array,
    num_quantizers: int | jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
    """Samples the channels of the next frame, by the depth Transformer.

    Args:
      speech: The model.
      state: The sequences so far.
      keys: [B] random keys of the frame.
      num_quantizers: Quantizers in use.
      sampling: How codes are sampled.

    Returns:
      Whether speech ends here, bool [B], and codes [B, Q]; K of the quantizers that are not in use.
    """
    config = speech.config
    depth = config.depth
    batch = len(state.max_frames)
    cache = empty_cache(depth.block, depth.num_layers, speech.compute, batch, config.num_channels)

    def sample(
        level: int | jax.Array, x: jax.Array, cache: Cache, codes: jax.Array, group: Channel
    ) -> tuple[jax.Array, Cache, jax.Array]:
        """Adds the code of a quantizer; returns the next channel's input."""
        states, cache = _extend_depth(speech, level + 1, x, cache)
        levels = jnp.asarray(level)[None]
        logits = speech.apply(states, levels, method="code_logits")[:, 0]
        logits = logits.at[:, config.codebook_size].set(-jnp.inf)
        logits = penalize(logits, state.seen[:, level], group)
        level_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, level + 1)
        code = choose_each(logits, level_keys, group)
        x = speech.params["code_embeddings"][level, code]
        return x, cache, codes.at[:, level].set(code)

    states, cache = _extend_depth(speech, 0, state.hidden, cache)
    ends = _sample_end(speech, states[:, 0], state.num_frames, keys, sampling.text)
    x = jnp.broadcast_to(speech.params["text_embedding"][config.slot_id], state.hidden.shape)
    codes = jnp.full((batch, config.num_quantizers), config.codebook_size, jnp.int32)
    carry = sample(0, x, cache, codes, sampling.first)

    def step(level: jax.Array, carry: Any) -> Any:
        x, cache, codes = carry
        return sample(level, x, cache, codes, sampling.others)

    _, _, codes = jax.lax.fori_loop(1, num_quantizers, step, carry)
    return ends, codes


def _extend_depth(
    speech: Speech, channel: int | jax.Array, x: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """From the input [B, D] of a channel to its state [B, 1, D] before the head."""
    batch = len(x)
    span = Span(jnp.full(batch, channel), jnp.ones(batch, jnp.int32))
    x = x[:, None].astype(speech.compute.dtype)
    states, cache = speech.apply(x, cache, span, method="depth_states")
    channels = jnp.asarray(channel)[None]
    return speech.apply(states, channels, method="head_states"), cache


def _sample_end(
    speech: Speech, states: jax.Array, num_frames: jax.Array, keys: jax.Array, group: Channel
) -> jax.Array:
    """Whether speech ends, bool [B], from the text channel's states [B, D]; not before a frame."""
    choices = (speech.config.slot_id, speech.config.end_id)
    logits = speech.apply(states, choices, method="text_logits")
    end_logit = jnp.where(num_frames == 0, -jnp.inf, logits[:, 1])
    logits = logits.at[:, 1].set(end_logit)
    text_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
    return choose_each(logits, text_keys, group) == 1


def _quantizers_in_use(
    config: SpeechConfig, batch: int, num_quantizers: int | jax.Array
) -> jax.Array:
    """Whether each quantizer is in use, bool [B, Q]."""
    in_use = jnp.arange(config.num_quantizers) < num_quantizers
    return jnp.broadcast_to(in_use, (batch, config.num_quantizers))
