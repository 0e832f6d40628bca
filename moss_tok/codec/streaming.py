"""Streams: encode and decode as audio comes, with the answers of `encode` and `decode`.

Pure functions over a `StreamState`, a pytree of fixed shapes, for a batch of streams (slots), each
at a place of its own. Algorithmic latency is one code frame. `live.py` has classes that buffer.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from moss_tok import sharding, summary
from moss_tok.codec.checks import (
    check_codes,
    check_count,
    check_part,
    check_wav,
)
from moss_tok.codec.inference import Codec, zero_past
from moss_tok.codec.model import Caches, empty_caches
from moss_tok.nn.cache import Span


@flax.struct.dataclass
class StreamState:
    """Where streams are.

    Attributes:
      position: [B] int32, code frames that each stream has had. The fastest stage counts its own
        frames in 31 bits: 62 days at 400 Hz.
      caches: Keys and values of the last window - 1 frames, by stage.
    """

    position: jax.Array
    caches: Caches

    def __repr__(self) -> str:
        position = summary.describe_values(self.position)
        return f"StreamState(position: {position}, caches of {summary.megabytes(self.caches)})"


def init_encoder_stream(codec: Codec, batch_size: int) -> StreamState:
    """State of `batch_size` streams of audio that have not begun; on the mesh of the parameters."""
    return init_stream(codec, "encoder", batch_size)


def init_decoder_stream(codec: Codec, batch_size: int) -> StreamState:
    """State of `batch_size` streams of codes that have not begun; on the mesh of the parameters."""
    return init_stream(codec, "decoder", batch_size)


def encode_step(
    codec: Codec,
    state: StreamState,
    wav: jax.Array,
    lengths: jax.Array | None = None,
    num_quantizers: int | None = None,
) -> tuple[StreamState, jax.Array]:
    """Encodes the next chunk of each stream.

    Compiled once per T and num_quantizers. A stream's codes depend on its own samples alone.

    Args:
      codec: A codec with an encoder.
      state: Donated: use the returned one from now on.
      wav: [B, C, T * hop_length] in [-1, 1], T = 1, 2, ... frames.
      lengths: [B] integers, samples of each stream in this chunk; the rest is not looked at. 0: the
        stream idles, its state stays. No multiple of hop_length: the stream's last frame, padded
        with zeros; it must be reset before it goes on. Default: all.
      num_quantizers: The first 1..Q codes of each frame; default: all. Static under `jax.jit`.

    Returns:
      The next state, and codes [B, num_quantizers, T] int32, zero past the lengths.

    Raises:
      ValueError: Wrong shapes, types or values (see `moss_tok`), num_quantizers out of range, a
        codec without encoder, or a state of its decoder.
    """
    c = codec.config
    num_quantizers = c.check_num_quantizers(num_quantizers)
    _check_state(codec, "encoder", state)
    shape = (state.position.shape[0], c.num_channels, "T * hop_length")
    wav, lengths = check_wav(wav, shape, lengths)
    if wav.shape[-1] % c.hop_length:
        raise ValueError(
            f"a chunk must have whole frames of {c.hop_length} samples, got {wav.shape[-1]}"
        )
    return _encode_step(codec, state, wav, lengths, num_quantizers)


def decode_step(
    codec: Codec, state: StreamState, codes: jax.Array, lengths: jax.Array | None = None
) -> tuple[StreamState, jax.Array]:
    """Decodes the next chunk of each stream; compiled once per shape of `codes`.

    Args:
      codec: A codec with a decoder.
      state: Donated: use the returned one from now on.
      codes: [B, q, T] integers in [0, codebook_size), T = 1, 2, ... frames.
      lengths: [B] integers, frames of each stream in this chunk; 0: it idles. Default: all T.

    Returns:
      The next state, and wav [B, C, T * hop_length] float32, zero past the lengths.

    Raises:
      ValueError: Wrong shapes, types or values (see `moss_tok`), a codec without decoder, or a
        state of its encoder.
    """
    _check_state(codec, "decoder", state)
    shape = (state.position.shape[0], "Q", "T")
    codes, lengths = check_codes(codes, shape, codec.config.quantizer.codebook_size, lengths)
    codec.config.check_num_quantizers(codes.shape[1])
    return _decode_step(codec, state, codes, lengths)


def reset_streams(state: StreamState, slots: jax.Array) -> StreamState:
    """Begins anew the streams where `slots`, bool [B], is true; the others go on.

    What they have heard is overwritten, so that not even NaN is left of it.

    Args:
      state: Donated: use the returned one from now on.
      slots: bool [B].

    Returns:
      The next state.

    Raises:
      ValueError: `slots` of another shape or type, or no state.
    """
    _check_usable(state)
    slots = slots if isinstance(slots, jax.Array) else np.asarray(slots)
    if slots.shape != state.position.shape or slots.dtype != bool:
        raise ValueError(
            f"slots must be booleans of the shape {list(state.position.shape)}, "
            f"got {slots.dtype} {list(slots.shape)}"
        )
    return _reset_streams(state, slots)


@functools.partial(jax.jit, donate_argnums=0)
def _reset_streams(state: StreamState, slots: jax.Array) -> StreamState:

    def clear(ring):
        return jnp.where(slots[:, None, None, None], 0, ring)

    return StreamState(jnp.where(slots, 0, state.position), jax.tree.map(clear, state.caches))


def init_stream(codec: Codec, side: str, batch_size: int) -> StreamState:
    """State of streams of one side, "encoder" or "decoder"; on the mesh of the parameters."""
    check_part(codec, side)
    check_count("batch_size", batch_size)

    def init():
        caches = empty_caches(codec.config, codec.compute, side, batch_size)
        return StreamState(jnp.zeros(batch_size, jnp.int32), caches)

    # Where the parameters are, and committed to it as they are, or the second step compiles again.
    weight = jax.tree.leaves(codec.params)[0]
    is_traced = isinstance(weight, jax.core.Tracer)
    if is_traced or not getattr(weight, "committed", False):
        return init()

    def place(x):
        placed = weight.sharding
        if isinstance(placed, jax.sharding.NamedSharding):
            names = ("batch",) if x.ndim == 1 else (None, "batch", "heads", None, None)
            placed = sharding.fitting(placed.mesh, names, x.shape)
        # Not by `out_shardings`: jit keeps their spelling, and takes the steps' for another place.
        return jax.lax.with_sharding_constraint(x, placed)

    return jax.jit(lambda: jax.tree.map(place, init()))()


def _check_state(codec: Codec, side: str, state: StreamState) -> None:
    """Raises ValueError unless the state is one of that side: the other's may fit it, silently."""
    check_part(codec, side)
    _check_usable(state)
    wanted = _cache_shapes(codec.config, codec.compute, side, state.position.shape[0])
    if wanted != _shapes(state.caches):
        raise ValueError(f"state must be one of init_{side}_stream of this codec")


@functools.lru_cache(maxsize=64)
def _cache_shapes(config, compute, side: str, batch_size: int) -> Any:
    return _shapes(jax.eval_shape(lambda: empty_caches(config, compute, side, batch_size)))


def _shapes(caches: Caches) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), caches)


def _check_usable(state: StreamState) -> None:
    """Raises ValueError where it is no state, or has been given to a step before."""
    arrays = jax.tree.leaves(state, is_leaf=lambda x: x is None)
    if not isinstance(state, StreamState) or not all(hasattr(x, "shape") for x in arrays):
        raise ValueError(
            "state must be one of init_encoder_stream or init_decoder_stream, "
            f"got {type(state).__name__} of {sorted({type(x).__name__ for x in arrays})}"
        )
    x = state.position
    if len(x.shape) != 1:
        raise ValueError(f"a state's position must have the shape [B], got {list(x.shape)}")
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_deleted():
        raise ValueError("this state has been used: a step donates it, go on with what it returned")


@functools.partial(jax.jit, static_argnames="num_quantizers", donate_argnames="state")
def _encode_step(codec: Codec, state: StreamState, wav, lengths, num_quantizers: int):
    wav = zero_past(wav, lengths).astype(jnp.float32)
    span = Span(state.position, codec.config.num_frames(lengths))
    codes, caches = codec.apply(wav, num_quantizers, state.caches, span, method="encode_step")
    return StreamState(state.position + span.count, caches), zero_past(codes, span.count)


@functools.partial(jax.jit, donate_argnames="state")
def _decode_step(codec: Codec, state: StreamState, codes, lengths):
    codes = zero_past(codes, lengths)
    span = Span(state.position, lengths)
    wav, caches = codec.apply(codes, state.caches, span, method="decode_step")
    wav = zero_past(wav, lengths * codec.config.hop_length)
    return StreamState(state.position + span.count, caches), wav
