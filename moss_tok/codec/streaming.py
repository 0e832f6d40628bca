"""Streaming: encode and decode chunk by chunk, with the same results as `encode` and `decode`.

These are pure functions over a `StreamState`, a pytree of fixed shapes. The state holds a batch of
streams (slots), each at its own position. Algorithmic latency is one code frame. The classes in
`live.py` add buffering, so that blocks may have any length.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from moss_tok import sharding, summary
from moss_tok.codec.checks import (
    check_codes,
    check_count,
    check_part,
    check_static,
    check_wav,
)
from moss_tok.codec.config import CodecConfig
from moss_tok.codec.inference import Codec
from moss_tok.codec.masks import zero_past
from moss_tok.codec.model import Caches, empty_caches
from moss_tok.nn.cache import Span
from moss_tok.nn.compute import ComputeConfig


@flax.struct.dataclass
class StreamState:
    """State of a batch of streams; see `init_encoder_stream` and `init_decoder_stream`.

    Attributes:
      position: [B] int32, code frames that each stream has processed. Each stage counts its own
        frames in 31 bits, which limits a stream to 62 days if the fastest stage has 400 Hz.
      caches: Keys and values of the last window - 1 frames of each stage, by name of the stage.
    """

    position: jax.Array
    caches: Caches

    def __repr__(self) -> str:
        position = summary.describe_values(self.position)
        return f"StreamState(position: {position}, caches of {summary.megabytes(self.caches)})"


def init_encoder_stream(codec: Codec, batch_size: int) -> StreamState:
    """Creates the initial state for `encode_step`.

    Args:
      codec: A codec with an encoder.
      batch_size: Number of streams, B.

    Returns:
      The state, on the devices (or the mesh) of the parameters.

    Raises:
      ValueError: batch_size is not a positive integer, or the codec was loaded without its encoder.
    """
    return init_stream(codec, "encoder", batch_size)


def init_decoder_stream(codec: Codec, batch_size: int) -> StreamState:
    """Creates the initial state for `decode_step`.

    Args:
      codec: A codec with a decoder.
      batch_size: Number of streams, B.

    Returns:
      The state, on the devices (or the mesh) of the parameters.

    Raises:
      ValueError: batch_size is not a positive integer, or the codec was loaded without its decoder.
    """
    return init_stream(codec, "decoder", batch_size)


def encode_step(
    codec: Codec,
    state: StreamState,
    wav: ArrayLike,
    lengths: ArrayLike | None = None,
    num_quantizers: int | None = None,
) -> tuple[StreamState, jax.Array]:
    """Encodes the next chunk of each stream.

        state = moss_tok.init_encoder_stream(codec, batch_size=1)
        for wav in chunks:  # [1, C, T * hop_length]
            state, codes = moss_tok.encode_step(codec, state, wav)

    It compiles once per T and num_quantizers. The codes of a stream depend only on its own samples.

    Args:
      codec: A codec with an encoder.
      state: State before the chunk. It is donated, so use only the returned state afterwards.
      wav: [B, C, T * hop_length] floating point in [-1, 1], T >= 1 frames.
      lengths: [B] integers, valid samples of each stream in this chunk; the rest has no effect.
        With 0 a stream pauses and its state is unchanged. A length that is not a multiple of
        hop_length ends the stream: its last frame is padded with zeros, and it must be reset before
        it gets more audio. Default: all samples.
      num_quantizers: Number of codes per frame, 1..Q, the most significant ones first; default: Q.
        Static under `jax.jit`.

    Returns:
      The next state, and codes [B, num_quantizers, T] int32, zero past the lengths.

    Raises:
      ValueError: An argument has the wrong shape, type or values (see `moss_tok`), num_quantizers
        is out of range, the codec was loaded without its encoder, or the state is not from
        `init_encoder_stream` of this codec or was used before.
    """
    c = codec.config
    check_static("num_quantizers", num_quantizers)
    num_quantizers = c.check_num_quantizers(num_quantizers)
    _check_state(codec, "encoder", state)
    shape = (state.position.shape[0], c.num_channels, "T * hop_length")
    wav, lengths = check_wav(wav, shape, lengths)
    if wav.shape[-1] % c.hop_length:
        raise ValueError(
            f"a chunk must have whole frames of {c.hop_length} samples, got {wav.shape[-1]} samples"
        )
    return _encode_step(codec, state, wav, lengths, num_quantizers)


def decode_step(
    codec: Codec,
    state: StreamState,
    codes: ArrayLike,
    lengths: ArrayLike | None = None,
) -> tuple[StreamState, jax.Array]:
    """Decodes the next chunk of each stream.

        state = moss_tok.init_decoder_stream(codec, batch_size=1)
        for codes in chunks:  # [1, q, T]
            state, wav = moss_tok.decode_step(codec, state, codes)

    It compiles once per shape of `codes`.

    Args:
      codec: A codec with a decoder.
      state: State before the chunk. It is donated, so use only the returned state afterwards.
      codes: [B, q, T] integers in [0, codebook_size), of the first q quantizers, T >= 1 frames.
      lengths: [B] integers, valid frames of each stream in this chunk. With 0 a stream pauses and
        its state is unchanged. Default: all T.

    Returns:
      The next state, and wav [B, C, T * hop_length] float32, zero past the lengths.

    Raises:
      ValueError: An argument has the wrong shape, type or values (see `moss_tok`), the codec was
        loaded without its decoder, or the state is not from `init_decoder_stream` of this codec or
        was used before.
    """
    _check_state(codec, "decoder", state)
    shape = (state.position.shape[0], "Q", "T")
    codes, lengths = check_codes(codes, shape, codec.config.quantizer.codebook_size, lengths)
    codec.config.check_num_quantizers(codes.shape[1])
    return _decode_step(codec, state, codes, lengths)


def reset_streams(state: StreamState, slots: ArrayLike) -> StreamState:
    """Resets some streams to their start, so that their slots can take new streams.

    Everything cached of the old streams is overwritten, even NaN. The other streams continue.

    Args:
      state: State of an encoder or decoder. It is donated, so use only the returned state
        afterwards.
      slots: Bool [B], true for the streams to reset.

    Returns:
      The next state.

    Raises:
      ValueError: `slots` has another shape or type, or `state` is not a state or was used before.
    """
    _check_usable(state)
    mask = slots if isinstance(slots, jax.Array) else np.asarray(slots)
    if mask.shape != state.position.shape or mask.dtype != bool:
        raise ValueError(
            f"slots must be booleans of the shape {list(state.position.shape)}, "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    return _reset_streams(state, mask)


@functools.partial(jax.jit, donate_argnums=0)
def _reset_streams(state: StreamState, slots: jax.Array | np.ndarray) -> StreamState:

    def clear(ring: jax.Array) -> jax.Array:
        return jnp.where(slots[:, None, None, None], 0, ring)

    position = jnp.where(slots, 0, state.position)
    return StreamState(position, jax.tree.map(clear, state.caches))


def init_stream(codec: Codec, side: str, batch_size: int) -> StreamState:
    """Initial state of streams of one side, "encoder" or "decoder", placed like the parameters."""
    check_part(codec, side)
    check_count("batch_size", batch_size)

    def init() -> StreamState:
        caches = empty_caches(codec.config, codec.compute, side, batch_size)
        return StreamState(jnp.zeros(batch_size, jnp.int32), caches)

    # The state must be on the devices of the parameters, and committed to them if the parameters
    # are; otherwise the second step compiles again.
    weight = jax.tree.leaves(codec.params)[0]
    is_traced = isinstance(weight, jax.core.Tracer)
    if is_traced or not getattr(weight, "committed", False):
        return init()

    def place(x: jax.Array) -> jax.Array:
        placed = weight.sharding
        if isinstance(placed, jax.sharding.NamedSharding):
            names = ("batch",) if x.ndim == 1 else (None, "batch", "heads", None, None)
            placed = sharding.fitting(placed.mesh, names, x.shape)
        # `out_shardings` would not do: jit keeps their spelling, and takes the equal shardings that
        # the steps return for different ones.
        return jax.lax.with_sharding_constraint(x, placed)

    return jax.jit(lambda: jax.tree.map(place, init()))()


def _check_state(codec: Codec, side: str, state: StreamState) -> None:
    """Raises ValueError unless the state is of this side.

    The state of the other side may have the same shapes, and would give wrong results silently.
    """
    check_part(codec, side)
    _check_usable(state)
    expected = _cache_shapes(codec.config, codec.compute, side, state.position.shape[0])
    if expected != _shapes(state.caches):
        raise ValueError(f"state must be one of init_{side}_stream of this codec")


@functools.lru_cache(maxsize=64)
def _cache_shapes(config: CodecConfig, compute: ComputeConfig, side: str, batch_size: int) -> Any:
    return _shapes(jax.eval_shape(lambda: empty_caches(config, compute, side, batch_size)))


def _shapes(caches: Caches) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), caches)


def _check_usable(state: StreamState) -> None:
    """Raises ValueError unless `state` is a state whose arrays no step has consumed."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: x is None)
    if not isinstance(state, StreamState) or not all(hasattr(x, "shape") for x in leaves):
        types = sorted({type(x).__name__ for x in leaves})
        raise ValueError(
            "state must be one of init_encoder_stream or init_decoder_stream, "
            f"got {type(state).__name__} of {types}"
        )
    position = state.position
    if len(position.shape) != 1:
        raise ValueError(f"a state's position must have the shape [B], got {list(position.shape)}")
    is_concrete = isinstance(position, jax.Array) and not isinstance(position, jax.core.Tracer)
    if is_concrete and position.is_deleted():
        raise ValueError(
            "this state has been used: a step donates its state, use the one that it returned"
        )


@functools.partial(jax.jit, static_argnames="num_quantizers", donate_argnames="state")
def _encode_step(
    codec: Codec, state: StreamState, wav: jax.Array, lengths: jax.Array, num_quantizers: int
) -> tuple[StreamState, jax.Array]:
    wav = zero_past(wav, lengths).astype(jnp.float32)
    span = Span(state.position, codec.config.num_frames(lengths))
    codes, caches = codec.apply(wav, num_quantizers, state.caches, span, method="encode_step")
    return StreamState(state.position + span.count, caches), zero_past(codes, span.count)


@functools.partial(jax.jit, donate_argnames="state")
def _decode_step(
    codec: Codec, state: StreamState, codes: jax.Array, lengths: jax.Array
) -> tuple[StreamState, jax.Array]:
    codes = zero_past(codes, lengths)
    span = Span(state.position, lengths)
    wav, caches = codec.apply(codes, state.caches, span, method="decode_step")
    wav = zero_past(wav, lengths * codec.config.hop_length)
    return StreamState(state.position + span.count, caches), wav
