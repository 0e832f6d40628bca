"""`encode` and `decode`: pure functions over a `Codec`, a pytree of parameters."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from moss_tok import summary
from moss_tok.codec import presets
from moss_tok.codec.checks import (
    check_codes,
    check_num_samples,
    check_part,
    check_static,
    check_wav,
)
from moss_tok.codec.chunks import pad, scan_chunks
from moss_tok.codec.config import CodecConfig
from moss_tok.codec.masks import prefix_mask, zero_past
from moss_tok.codec.model import Caches, CodecModel, empty_caches
from moss_tok.errors import is_number
from moss_tok.nn.cache import Span
from moss_tok.nn.compute import ComputeConfig

# The rule for all audio, here and in the commands: up to a minute is computed at once, and longer
# audio in chunks.
WHOLE_SECONDS = 60.0
CHUNK_SECONDS = 20.0  # not shorter, because each chunk reads all weights again


@flax.struct.dataclass
class Codec:
    """A codec with its parameters, as `moss_tok.load` returns it.

    It is a pytree with static configs, so it can be an argument of functions under `jax.jit`.

    Attributes:
      params: Parameters, float32, under "encoder", "quantizer" and "decoder"; a side that was not
        loaded is missing (see `load`).
      config: Architecture of the codec.
      compute: How the codec is computed: types, precision, attention.
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
        """Calls the method `method` of the model with `params`."""
        return self.model.apply({"params": self.params}, *args, method=method)


class Encoded(NamedTuple):
    """Result of `encode`.

    Attributes:
      codes: [B, Q, T] int32, zero past the lengths.
      lengths: [B] int32, valid frames of each item.
    """

    codes: jax.Array
    lengths: jax.Array

    def __repr__(self) -> str:
        return summary.describe_arrays("Encoded", **self._asdict())


class Decoded(NamedTuple):
    """Result of `decode`.

    Attributes:
      wav: Audio [B, C, S] float32, zero past the lengths.
      lengths: [B] int32, valid samples per channel of each item.
    """

    wav: jax.Array
    lengths: jax.Array

    def __repr__(self) -> str:
        return summary.describe_arrays("Decoded", **self._asdict())


def bucket_frames(num_frames: int, per_octave: int = 8) -> int:
    """Rounds a length up to one of `per_octave` lengths per octave, so that few programs compile.

    `per_octave` is a power of two. With eight, padding costs at most 12 %, on average 4 %.
    """
    step = 2 ** max(0, num_frames.bit_length() - per_octave.bit_length())
    return -(-num_frames // step) * step


def batch_rows(num_left: int, full: int, multiple: int = 1) -> int:
    """Rows of the next batch of a bucket.

    A batch has `full` rows or, if fewer recordings are left, an eighth of them, some of which may
    be empty. So each length needs two programs. Compiling more takes longer than computing empty
    rows.

    Args:
      num_left: Recordings that are not in a batch yet.
      full: Rows of a full batch, a multiple of `multiple`.
      multiple: Divides the result.
    """
    if num_left >= full:
        return full
    return max(full // 8 // multiple, 1) * multiple


def is_long(seconds: float) -> bool:
    """Whether audio of this length is computed in chunks."""
    return seconds > WHOLE_SECONDS


def chunk_frames(config: CodecConfig, seconds: float | None = None) -> int:
    """Code frames of a chunk of `seconds` (default: CHUNK_SECONDS), at least one."""
    if seconds is None:
        seconds = CHUNK_SECONDS
    return max(1, round(seconds * config.frame_rate))


def encode(
    codec: Codec,
    wav: ArrayLike,
    lengths: ArrayLike | None = None,
    num_quantizers: int | None = None,
    chunk_seconds: float | None = None,
) -> Encoded:
    """Encodes a batch of audio into codes.

        codec = moss_tok.load("runs/quickstart")
        codes, lengths = moss_tok.encode(codec, wav, num_quantizers=8)

    The codes of an item depend only on its valid samples; whatever lies past its length, even NaN,
    has no effect. A partly filled last frame is padded with zeros and counts as a frame. Long audio
    is computed in chunks, so that memory for activations does not grow with its length.

    Args:
      codec: A codec with an encoder.
      wav: [B, C, S] floating point in [-1, 1] at `codec.config.sample_rate`.
      lengths: [B] integers, valid samples per channel of each item; default: all S.
      num_quantizers: Number of codes per frame, 1..Q, the most significant ones first; default: Q.
        Static under `jax.jit`.
      chunk_seconds: Length of a chunk; 0 computes everything at once. Default: everything at once
        up to 60 seconds, else chunks of 20 seconds. It affects rounding only. Static under
        `jax.jit`.

    Returns:
      `Encoded`: codes [B, num_quantizers, T] int32 with T = ceil(S / hop_length), and lengths [B]
      in frames.

    Raises:
      ValueError: An argument has the wrong shape, type or values (see `moss_tok`), wav has 2**31
        samples or more, num_quantizers or chunk_seconds is out of range, or the codec was loaded
        without its encoder.
    """
    check_static("num_quantizers", num_quantizers)
    num_quantizers = codec.config.check_num_quantizers(num_quantizers)
    check_part(codec, "encoder")
    wav, lengths = check_wav(wav, ("B", codec.config.num_channels, "S"), lengths)
    check_num_samples("EncoderStream", wav.shape[-1])
    num_frames = codec.config.num_frames(wav.shape[-1])
    frames_per_chunk = _frames_per_chunk(codec, num_frames, chunk_seconds)
    return _encode(codec, wav, lengths, num_quantizers, frames_per_chunk)


def decode(
    codec: Codec,
    codes: ArrayLike,
    lengths: ArrayLike | None = None,
    chunk_seconds: float | None = None,
) -> Decoded:
    """Decodes a batch of codes into audio.

        wav, lengths = moss_tok.decode(codec, codes, lengths)

    Args:
      codec: A codec with a decoder.
      codes: [B, q, T] integers in [0, codebook_size), of the first q of the Q quantizers. Fewer
        quantizers are a lower bitrate of the same audio.
      lengths: [B] integers, valid frames of each item; default: all T.
      chunk_seconds: As in `encode`.

    Returns:
      `Decoded`: wav [B, C, T * hop_length] float32 at `codec.config.sample_rate`, and lengths [B]
      in samples, whole frames. Samples that only padded the last frame are not cut.

    Raises:
      ValueError: An argument has the wrong shape, type or values (see `moss_tok`), the audio would
        have 2**31 samples or more, chunk_seconds is out of range, or the codec was loaded without
        its decoder.
    """
    return _decode_prefix(codec, codes, lengths, None, chunk_seconds)


def _decode_prefix(
    codec: Codec,
    codes: ArrayLike,
    lengths: ArrayLike | None,
    num_quantizers: int | None,
    chunk_seconds: float | None = None,
) -> Decoded:
    """Decodes codes[:, :num_quantizers]; one compiled program serves every `num_quantizers`."""
    check_part(codec, "decoder")
    codebook_size = codec.config.quantizer.codebook_size
    codes, lengths = check_codes(codes, ("B", "Q", "T"), codebook_size, lengths)
    codec.config.check_num_quantizers(codes.shape[1])
    check_num_samples("DecoderStream", codes.shape[-1] * codec.config.hop_length)
    if num_quantizers is None:
        num_quantizers = codes.shape[1]
    frames_per_chunk = _frames_per_chunk(codec, codes.shape[-1], chunk_seconds)
    return _decode(codec, codes, lengths, num_quantizers, frames_per_chunk)


def encode_one(codec: Codec, wav: np.ndarray, num_quantizers: int | None = None) -> np.ndarray:
    """Encodes one recording [C, S] -> [Q, T], padded to few shapes (see `bucket_frames`)."""
    return encode_batch(codec, [wav], num_quantizers)[0]


def encode_batch(
    codec: Codec,
    wavs: Sequence[np.ndarray],
    num_quantizers: int | None = None,
    num_frames: int | None = None,
) -> list[np.ndarray]:
    """Encodes recordings [C, S] of similar length -> [Q, T] each.

    They are padded to `num_frames`; default: the bucket of the longest, see `bucket_frames`.
    """
    lengths = np.array([wav.shape[-1] for wav in wavs])
    if num_frames is None:
        num_frames = bucket_frames(codec.config.num_frames(int(lengths.max())))
    size = num_frames * codec.config.hop_length
    encoded = encode(codec, stack(wavs, size), lengths, num_quantizers)
    rows = []
    for codes, length in zip(np.asarray(encoded.codes), lengths.tolist(), strict=True):
        rows.append(codes[:, : codec.config.num_frames(length)])
    return rows


def decode_one(codec: Codec, codes: np.ndarray, num_quantizers: int | None = None) -> np.ndarray:
    """Decodes one recording [q, T] -> [C, T * hop_length], padded to few shapes.

    `num_quantizers` (default: q) decodes the first quantizers only, with the same program.
    """
    return decode_batch(codec, [codes], num_quantizers)[0]


def decode_batch(
    codec: Codec,
    codes: Sequence[np.ndarray],
    num_quantizers: int | None = None,
    num_frames: int | None = None,
) -> list[np.ndarray]:
    """`decode_one` for recordings [q, T] of similar length -> [C, T * hop_length] each.

    They are padded to `num_frames` as in `encode_batch`.
    """
    lengths = np.array([x.shape[-1] for x in codes])
    num_frames = num_frames or bucket_frames(int(lengths.max()))
    decoded = _decode_prefix(codec, stack(codes, num_frames), lengths, num_quantizers)
    rows = []
    for wav, length in zip(np.asarray(decoded.wav), lengths.tolist(), strict=True):
        rows.append(wav[:, : length * codec.config.hop_length])
    return rows


def stack(recordings: Sequence[np.ndarray | jax.Array], size: int) -> np.ndarray:
    """Stacks recordings [*, S] into one batch [B, *, size], padded with zeros at the end."""
    rows = []
    for recording in recordings:
        padding = size - recording.shape[-1]
        rows.append(np.pad(recording, ((0, 0), (0, padding))))
    return np.stack(rows)


def _frames_per_chunk(codec: Codec, num_frames: int, chunk_seconds: float | None) -> int:
    """Frames per chunk; `num_frames` if everything is computed at once."""
    config = codec.config
    check_static("chunk_seconds", chunk_seconds)
    if chunk_seconds is None:
        chunk_seconds = CHUNK_SECONDS if is_long(num_frames / config.frame_rate) else 0
    if not (is_number(chunk_seconds) and chunk_seconds >= 0):
        raise ValueError(f"chunk_seconds must be a number of at least 0, got {chunk_seconds!r}")
    if chunk_seconds == 0:
        return num_frames
    num_chunks = -(-num_frames // chunk_frames(config, chunk_seconds))
    return -(-num_frames // num_chunks)  # chunks of equal size need little padding


@functools.partial(jax.jit, static_argnames=("num_quantizers", "frames_per_chunk"))
def _encode(
    codec: Codec, wav: jax.Array, lengths: jax.Array, num_quantizers: int, frames_per_chunk: int
) -> Encoded:
    c = codec.config
    num_frames = c.num_frames(wav.shape[-1])
    if frames_per_chunk == num_frames:
        wav = pad(zero_past(wav, lengths), c.hop_length).astype(jnp.float32)
        codes = codec.apply(wav, num_quantizers, method="encode").codes
    else:

        def step(caches: Caches, wav: jax.Array, span: Span) -> tuple[jax.Array, Caches]:
            wav = wav.astype(jnp.float32)
            return codec.apply(wav, num_quantizers, caches, span, method="encode_step")

        codes = jnp.zeros((wav.shape[0], num_quantizers, num_frames), jnp.int32)
        units = (c.hop_length, 1)
        caches = empty_caches(c, codec.compute, "encoder", wav.shape[0])
        codes = scan_chunks(caches, step, wav, lengths, codes, units, frames_per_chunk)
    lengths = c.num_frames(lengths)
    return Encoded(zero_past(codes, lengths), lengths)


@functools.partial(jax.jit, static_argnames="frames_per_chunk")
def _decode(
    codec: Codec,
    codes: jax.Array,
    lengths: jax.Array,
    num_quantizers: int | jax.Array,
    frames_per_chunk: int,
) -> Decoded:
    c = codec.config
    mask = prefix_mask(codes, num_quantizers)
    if frames_per_chunk == codes.shape[-1]:
        codes = zero_past(codes, lengths)
        wav = codec.apply(codes, mask, method="decode")
    else:

        def step(caches: Caches, codes: jax.Array, span: Span) -> tuple[jax.Array, Caches]:
            return codec.apply(codes, caches, span, mask, method="decode_step")

        shape = (codes.shape[0], c.num_channels, codes.shape[-1] * c.hop_length)
        wav = jnp.zeros(shape, jnp.float32)
        units = (1, c.hop_length)
        caches = empty_caches(c, codec.compute, "decoder", codes.shape[0])
        wav = scan_chunks(caches, step, codes, lengths, wav, units, frames_per_chunk)
    lengths = lengths * c.hop_length
    return Decoded(zero_past(wav, lengths), lengths)
