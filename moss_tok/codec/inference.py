"""Pure functions at the edges: `encode` and `decode` over a `Codec`, a pytree of parameters."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from moss_tok import summary
from moss_tok.codec import presets
from moss_tok.codec.checks import check_codes, check_part, check_wav
from moss_tok.codec.config import CodecConfig
from moss_tok.codec.model import CodecModel, empty_caches
from moss_tok.errors import is_number
from moss_tok.nn.cache import Span
from moss_tok.nn.compute import ComputeConfig

WHOLE_SECONDS = 60.0  # longer audio is computed in chunks
CHUNK_SECONDS = 20.0  # each reads all weights again


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

    def __repr__(self) -> str:
        parts = [presets.describe(self.config), summary.count_parameters(self.params)]
        for name in ("encoder", "decoder"):
            if isinstance(self.params, Mapping) and name not in self.params:
                parts.append(f"without {name}")
        return f"Codec({', '.join(parts)})"

    @property
    def model(self) -> CodecModel:
        """The Linen module of `params`."""
        return CodecModel(self.config, self.compute)

    def apply(self, *args: Any, method: str) -> Any:
        """Calls a method of the model with `params`."""
        return self.model.apply({"params": self.params}, *args, method=method)


class Encoded(NamedTuple):
    """Codes [B, Q, T] int32, zero past `lengths` [B] int32 (frames)."""

    codes: jax.Array
    lengths: jax.Array

    def __repr__(self) -> str:
        return summary.describe_arrays("Encoded", **self._asdict())


class Decoded(NamedTuple):
    """Audio [B, C, S] float32, zero past `lengths` [B] int32 (samples)."""

    wav: jax.Array
    lengths: jax.Array

    def __repr__(self) -> str:
        return summary.describe_arrays("Decoded", **self._asdict())


def bucket_frames(num_frames: int, per_octave: int = 8) -> int:
    """One of few lengths per octave (a power of two), so that few programs are compiled.

    Padding up to one of eight costs 12 % at most, 4 % in the mean.
    """
    step = 2 ** max(0, num_frames.bit_length() - per_octave.bit_length())
    return -(-num_frames // step) * step


def encode(
    codec: Codec,
    wav: jax.Array,
    lengths: jax.Array | None = None,
    num_quantizers: int | None = None,
    chunk_seconds: float | None = None,
) -> Encoded:
    """Turns audio into codes.

    An item's codes depend on its own samples alone: what lies past its length, NaN included, is
    never looked at. The last, partly filled frame is padded with zeros and counts.
    Long audio is computed chunk by chunk, in memory that does not grow with its length.

    Args:
      codec: A codec with an encoder.
      wav: [B, C, S] in [-1, 1] at config.sample_rate.
      lengths: [B] integers, valid samples of each item; default: all S.
      num_quantizers: The first 1..Q codes of each frame; default: all. Static under `jax.jit`.
      chunk_seconds: Length of a chunk, 0: all at once; default: all at once up to
        `WHOLE_SECONDS`, then `CHUNK_SECONDS`. Changes rounding only. Static.

    Returns:
      `Encoded`: codes [B, num_quantizers, ceil(S / hop_length)] and their lengths.

    Raises:
      ValueError: Wrong shapes, types or values (see `moss_tok`), 2**31 samples or more,
        num_quantizers or chunk_seconds out of range, or a codec without encoder.
    """
    num_quantizers = codec.config.check_num_quantizers(num_quantizers)
    check_part(codec, "encoder")
    wav, lengths = check_wav(wav, ("B", codec.config.num_channels, "S"), lengths)
    _check_num_samples("EncoderStream", wav.shape[-1])
    num_frames = codec.config.num_frames(wav.shape[-1])
    return _encode(
        codec, wav, lengths, num_quantizers, _chunk_frames(codec, num_frames, chunk_seconds)
    )


def decode(
    codec: Codec,
    codes: jax.Array,
    lengths: jax.Array | None = None,
    chunk_seconds: float | None = None,
) -> Decoded:
    """Turns codes back into audio.

    Args:
      codec: A codec with a decoder.
      codes: [B, q, T] integers in [0, codebook_size), of the first q = 1..Q quantizers.
      lengths: [B] integers, valid frames of each item; default: all T.
      chunk_seconds: As in `encode`.

    Returns:
      `Decoded`: wav [B, C, T * hop_length] and lengths * hop_length.

    Raises:
      ValueError: Wrong shapes, types or values (see `moss_tok`), 2**31 samples or more,
        chunk_seconds out of range, or a codec without decoder.
    """
    return _decode_prefix(codec, codes, lengths, None, chunk_seconds)


def _decode_prefix(codec, codes, lengths, num_quantizers, chunk_seconds=None) -> Decoded:
    """`decode` of codes[:, :num_quantizers], by one program for all numbers."""
    check_part(codec, "decoder")
    size = codec.config.quantizer.codebook_size
    codes, lengths = check_codes(codes, ("B", "Q", "T"), size, lengths)
    most = codec.config.check_num_quantizers(codes.shape[1])
    _check_num_samples("DecoderStream", codes.shape[-1] * codec.config.hop_length)
    chunk_frames = _chunk_frames(codec, codes.shape[-1], chunk_seconds)
    number = most if num_quantizers is None else num_quantizers
    return _decode(codec, codes, lengths, number, chunk_frames)


def _check_num_samples(instead: str, number: int) -> None:
    """Raises ValueError for more samples than int32 can count; an export's are not known yet."""
    if isinstance(number, int) and number >= 2**31:
        raise ValueError(f"{number} samples at once, the most is {2**31 - 1}: use {instead}")


def encode_one(codec: Codec, wav: np.ndarray, num_quantizers: int | None = None) -> np.ndarray:
    """`encode` of one recording [C, S] -> [Q, T], in one of few shapes; see `bucket_frames`."""
    return encode_batch(codec, [wav], num_quantizers)[0]


def encode_batch(
    codec: Codec, wavs: Sequence[np.ndarray], num_quantizers: int | None = None
) -> list[np.ndarray]:
    """`encode` of recordings [C, S] of about one length -> [Q, T] each, in one of few shapes."""
    hop, sizes = codec.config.hop_length, np.array([wav.shape[-1] for wav in wavs])
    size = bucket_frames(codec.config.num_frames(int(sizes.max()))) * hop
    codes = np.asarray(encode(codec, stack(wavs, size), sizes, num_quantizers).codes)
    return [x[:, : codec.config.num_frames(n)] for x, n in zip(codes, sizes.tolist(), strict=True)]


def decode_one(codec: Codec, codes: np.ndarray, num_quantizers: int | None = None) -> np.ndarray:
    """`decode` of one recording [q, T] -> [C, T * hop_length], in one of few shapes.

    `num_quantizers` (default: q) decodes the first ones only, by the same program.
    """
    return decode_batch(codec, [codes], num_quantizers)[0]


def decode_batch(
    codec: Codec, codes: Sequence[np.ndarray], num_quantizers: int | None = None
) -> list[np.ndarray]:
    """`decode_one` of recordings [q, T] of about one length -> [C, T * hop_length] each."""
    hop, sizes = codec.config.hop_length, np.array([x.shape[-1] for x in codes])
    size = bucket_frames(int(sizes.max()))
    wavs = np.asarray(_decode_prefix(codec, stack(codes, size), sizes, num_quantizers).wav)
    return [x[:, : n * hop] for x, n in zip(wavs, sizes.tolist(), strict=True)]


def stack(recordings: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Recordings [*, S] of at most `size` as one batch [B, *, size], zeros behind them."""
    return np.stack([np.pad(x, ((0, 0), (0, size - x.shape[-1]))) for x in recordings])


def _chunk_frames(codec: Codec, num_frames: int, chunk_seconds: float | None) -> int:
    """Frames of a chunk; all of them where there is only one."""
    rate = codec.config.frame_rate
    if chunk_seconds is None:
        chunk_seconds = 0 if num_frames <= WHOLE_SECONDS * rate else CHUNK_SECONDS
    if not (is_number(chunk_seconds) and chunk_seconds >= 0):
        raise ValueError(f"chunk_seconds must be a number of at least 0, got {chunk_seconds!r}")
    if chunk_seconds == 0:
        return num_frames
    num_chunks = -(-num_frames // max(1, round(chunk_seconds * rate)))
    return -(-num_frames // num_chunks)  # equal ones: little padding


@functools.partial(jax.jit, static_argnames=("num_quantizers", "chunk_frames"))
def _encode(codec: Codec, wav, lengths, num_quantizers: int, chunk_frames: int) -> Encoded:
    c = codec.config
    num_frames = c.num_frames(wav.shape[-1])
    if chunk_frames == num_frames:
        wav = _pad(zero_past(wav, lengths), c.hop_length).astype(jnp.float32)
        codes = codec.apply(wav, num_quantizers, method="encode").codes
    else:

        def step(caches, wav, span):
            wav = wav.astype(jnp.float32)
            return codec.apply(wav, num_quantizers, caches, span, method="encode_step")

        sizes, shape = (c.hop_length, 1), (wav.shape[0], num_quantizers, num_frames)
        codes = jnp.zeros(shape, jnp.int32)
        codes = _scan_chunks(codec, "encoder", step, wav, lengths, codes, sizes, chunk_frames)
    lengths = c.num_frames(lengths)
    return Encoded(zero_past(codes, lengths), lengths)


@functools.partial(jax.jit, static_argnames="chunk_frames")
def _decode(codec: Codec, codes, lengths, num_quantizers, chunk_frames: int) -> Decoded:
    c, keep = codec.config, prefix_mask(codes, num_quantizers)
    if chunk_frames == codes.shape[-1]:
        codes = zero_past(codes, lengths)
        wav = codec.apply(codes, keep, method="decode")
    else:

        def step(caches, codes, span):
            return codec.apply(codes, caches, span, keep, method="decode_step")

        shape = (codes.shape[0], c.num_channels, codes.shape[-1] * c.hop_length)
        sizes, wav = (1, c.hop_length), jnp.zeros(shape, jnp.float32)
        wav = _scan_chunks(codec, "decoder", step, codes, lengths, wav, sizes, chunk_frames)
    lengths = lengths * c.hop_length
    return Decoded(zero_past(wav, lengths), lengths)


def _scan_chunks(
    codec: Codec, side: str, step, x, lengths, out, sizes: tuple[int, int], chunk_frames: int
) -> jax.Array:
    """Applies `step` to one chunk of x [B, *, S] after the other, and puts the answers into `out`.

    `sizes` are those of a frame in both. Chunks are read where they are in x and written where they
    belong in `out`, so that nothing as long is copied. Of the first one so many frames count that
    the others are whole; what it says of more is written again.
    """
    batch, total = x.shape[0], out.shape[-1] // sizes[1]
    num_chunks = -(-total // chunk_frames)
    first = total - (num_chunks - 1) * chunk_frames

    def scanned(carry, index):
        caches, out = carry
        start = jnp.maximum(0, first + (index - 1) * chunk_frames)
        count = jnp.where(index == 0, first, chunk_frames)
        chunk = _slice(x, start * sizes[0], chunk_frames * sizes[0])
        chunk = zero_past(chunk, lengths - start * sizes[0])
        span = Span(*(jnp.broadcast_to(n, (batch,)) for n in (start, count)))
        answer, caches = step(caches, chunk, span)
        out = jax.lax.dynamic_update_slice_in_dim(out, answer, start * sizes[1], axis=2)
        return (caches, out), None

    caches = empty_caches(codec.config, codec.compute, side, batch)
    (_, out), _ = jax.lax.scan(scanned, (caches, out), jnp.arange(num_chunks))
    return out


def _slice(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """x[..., start : start + size], with anything behind the end of x."""
    beyond = jnp.maximum(0, start + size - x.shape[-1])  # so much earlier is read
    return jnp.roll(jax.lax.dynamic_slice_in_dim(x, start, size, axis=-1), -beyond, axis=-1)


def zero_past(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """Gives x [B, *, size], zero past the lengths [B], whatever is there."""
    return jnp.where(valid_mask(x.shape[-1], lengths)[:, None], x, 0)


def _pad(x: jax.Array, multiple: int) -> jax.Array:
    size = x.shape[-1]
    whole = -(-size // multiple) * multiple  # so that jax.export sees what divides it
    return jnp.pad(x, ((0, 0), (0, 0), (0, whole - size)))


def valid_mask(size: int, lengths: jax.Array) -> jax.Array:
    """Bool [B, size]: what lies before the lengths [B]."""
    return jnp.arange(size) < lengths[:, None]


def prefix_mask(codes: jax.Array, num_quantizers: int | jax.Array) -> jax.Array:
    """Bool [B, q] for codes [B, q, T]: the first quantizers, how many may be traced."""
    return jnp.broadcast_to(jnp.arange(codes.shape[1]) < num_quantizers, codes.shape[:2])
