"""Pure functions at the edges: `encode` and `decode` over a `Codec`, a pytree of parameters."""

import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from moss_tok.codec.model import CodecModel
from moss_tok.config import CodecConfig, ComputeConfig


@flax.struct.dataclass
class Codec:
    """A codec ready to use: a pytree whose configs are static, so it passes through `jax.jit`.

    Attributes:
      params: Parameters, float32. One side may be missing, see `load`.
      config: What the model is.
      compute: How it is computed.
    """

    params: Any
    config: CodecConfig = flax.struct.field(pytree_node=False)
    compute: ComputeConfig = flax.struct.field(pytree_node=False, default=ComputeConfig())

    @property
    def model(self) -> CodecModel:
        """The Linen module of `params`."""
        return CodecModel(self.config, self.compute)


class Encoded(NamedTuple):
    """Codes [B, Q, T] int32, zero past `lengths` [B] int32 (frames)."""

    codes: jax.Array
    lengths: jax.Array


class Decoded(NamedTuple):
    """Audio [B, C, S] float32, zero past `lengths` [B] int32 (samples)."""

    wav: jax.Array
    lengths: jax.Array


def encode(
    codec: Codec,
    wav: jax.Array,
    lengths: jax.Array | None = None,
    num_quantizers: int | None = None,
) -> Encoded:
    """Turns audio into codes.

    An item's codes depend on its own samples alone: what lies past its length, NaN included, is
    never looked at. The last, partly filled frame is padded with zeros and counts.

    Args:
      codec: A codec with an encoder.
      wav: [B, C, S] in [-1, 1] at config.sample_rate.
      lengths: [B] integers, valid samples of each item; default: all S.
      num_quantizers: The first 1..Q codes of each frame; default: all. Static under `jax.jit`.

    Returns:
      `Encoded`: codes [B, num_quantizers, ceil(S / hop_length)] and their lengths.

    Raises:
      ValueError: Wrong shapes, num_quantizers out of range, or a codec without encoder.
    """
    num_quantizers = codec.config.check_num_quantizers(num_quantizers)
    _check_part(codec, "encoder")
    wav = jnp.asarray(wav)
    _check_shape("wav", wav, ("B", codec.config.num_channels, "S"))
    if not jnp.issubdtype(wav.dtype, jnp.floating):
        raise ValueError(f"wav must be floating point in [-1, 1], got {wav.dtype}")
    lengths = _check_lengths(lengths, wav)
    return _encode(codec, wav, lengths, num_quantizers)


def decode(codec: Codec, codes: jax.Array, lengths: jax.Array | None = None) -> Decoded:
    """Turns codes back into audio.

    Args:
      codec: A codec with a decoder.
      codes: [B, q, T] integers in [0, codebook_size), of the first q = 1..Q quantizers.
      lengths: [B] integers, valid frames of each item; default: all T.

    Returns:
      `Decoded`: wav [B, C, T * hop_length] and lengths * hop_length.

    Raises:
      ValueError: Wrong shapes or type, or a codec without decoder.
    """
    _check_part(codec, "decoder")
    codes = jnp.asarray(codes)
    _check_shape("codes", codes, ("B", "Q", "T"))
    codec.config.check_num_quantizers(codes.shape[1])
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"codes must be integers, got {codes.dtype}")
    return _decode(codec, codes, _check_lengths(lengths, codes))


@functools.partial(jax.jit, static_argnames="num_quantizers")
def _encode(codec: Codec, wav, lengths, num_quantizers: int) -> Encoded:
    hop_length = codec.config.hop_length
    wav = jnp.where(_valid(wav.shape[-1], lengths)[:, None], wav, 0).astype(jnp.float32)
    wav = jnp.pad(wav, ((0, 0), (0, 0), (0, -wav.shape[-1] % hop_length)))
    variables = {"params": codec.params}
    codes = codec.model.apply(variables, wav, num_quantizers, method="encode").codes
    lengths = codec.config.num_frames(lengths)
    return Encoded(jnp.where(_valid(codes.shape[-1], lengths)[:, None], codes, 0), lengths)


@jax.jit
def _decode(codec: Codec, codes, lengths) -> Decoded:
    valid = _valid(codes.shape[-1], lengths)
    codes = jnp.where(valid[:, None], codes.astype(jnp.int32), 0)
    wav = codec.model.apply({"params": codec.params}, codes, method="decode")
    lengths = lengths * codec.config.hop_length
    return Decoded(jnp.where(_valid(wav.shape[-1], lengths)[:, None], wav, 0), lengths)


def _valid(size: int, lengths: jax.Array) -> jax.Array:
    return jnp.arange(size) < lengths[:, None]


def _check_part(codec: Codec, name: str) -> None:
    if name not in codec.params:
        raise ValueError(f"this codec was loaded without its {name}")


def _check_shape(name: str, x: jax.Array, shape: tuple[str | int, ...]) -> None:
    fits = x.ndim == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, x.shape, strict=True)
    )
    if not fits or 0 in x.shape:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have the shape [{wanted}], got {list(x.shape)}")


def _check_lengths(lengths: jax.Array | None, x: jax.Array) -> jax.Array:
    if lengths is None:
        return jnp.full(x.shape[:1], x.shape[-1], jnp.int32)
    if not isinstance(lengths, jax.Array):  # before 64 bits become 32
        lengths = np.asarray(lengths)
        lengths = np.clip(lengths, 0, x.shape[-1]) if lengths.dtype.kind in "iu" else lengths
    lengths = jnp.asarray(lengths)
    if lengths.shape != x.shape[:1] or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths must be integers of the shape [{x.shape[0]}], "
            f"got {lengths.dtype} {list(lengths.shape)}"
        )
    return jnp.clip(lengths.astype(jnp.int32), 0, x.shape[-1])
