"""Streams: encode and decode as audio comes, with the answers of `encode` and `decode`.

Pure functions over a `StreamState`, a pytree of fixed shapes, for a batch of streams (slots), each
at a place of its own; and two classes that buffer, for programs that hold samples, not frames.
Algorithmic latency is one code frame.
"""

import functools
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from moss_tok import sharding, summary
from moss_tok.codec import presets
from moss_tok.codec.checks import (
    check_code_range,
    check_codes,
    check_floating,
    check_integers,
    check_part,
    check_samples,
    check_shape,
    check_wav,
)
from moss_tok.codec.inference import Codec, zero_past
from moss_tok.codec.model import Caches, empty_caches
from moss_tok.nn.cache import Span

CHUNK_FRAMES = (1, 2, 4, 8)


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
    return _init(codec, "encoder", batch_size)


def init_decoder_stream(codec: Codec, batch_size: int) -> StreamState:
    """State of `batch_size` streams of codes that have not begun; on the mesh of the parameters."""
    return _init(codec, "decoder", batch_size)


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


def _init(codec: Codec, side: str, batch_size: int) -> StreamState:
    check_part(codec, side)
    _check_count("batch_size", batch_size)

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


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_count(name: str, value: Any) -> None:
    if not _is_integer(value) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


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


class _Stream:
    """What both classes share: buffers of each slot, cut into chunks of the sizes compiled.

    A chunk is run for all slots at once; each takes from its buffer what it has.
    """

    _side: str

    def __init__(
        self,
        codec: Codec,
        num_quantizers: int | None = None,
        num_slots: int = 1,
        chunk_frames: Sequence[int] = CHUNK_FRAMES,
        source: Iterable[np.ndarray] | None = None,
    ):
        """Compiles.

        Args:
          codec: A codec with this side.
          num_quantizers: The first 1..Q codes of each frame; default: all.
          num_slots: Streams side by side.
          chunk_frames: How many frames may be computed at once; what comes is cut into these.
          source: Blocks to iterate over.
        """
        _check_count("num_slots", num_slots)
        if source is not None and not isinstance(source, Iterable):
            raise ValueError(f"source must be an iterable of blocks, got {source!r}")
        if source is not None and num_slots > 1:
            raise ValueError(f"a source feeds one slot, there are {num_slots}: push to them")
        sizes = _sizes(chunk_frames)
        self._num_quantizers = codec.config.check_num_quantizers(num_quantizers)
        self._unit = codec.config.hop_length if self._side == "encoder" else 1  # of a frame
        self._codec, self._config, self._sizes, self._source = codec, codec.config, sizes, source
        check_part(codec, self._side)
        if not getattr(jax.tree.leaves(codec.params)[0], "is_fully_addressable", True):
            raise ValueError(
                f"{type(self).__name__} feeds the devices of one process, the parameters are on "
                f"those of several: call {self._side[:-1]}_step with global arrays"
            )
        self._state = _init(codec, self._side, num_slots)
        self._buffers = [self._nothing()] * num_slots
        self._finished = np.zeros(num_slots, bool)
        self._num_frames = np.zeros(num_slots, int)  # computed so far
        fastest = round(max(codec.config.stage_rates(self._side)) / codec.config.frame_rate)
        self._most_frames = (2**31 - 1) // fastest - sizes[-1]  # see `StreamState`
        self._iterator: Iterator[np.ndarray] | None = None
        for size in sizes:  # all slots idle: nothing but the compiling happens
            chunk = np.zeros((num_slots, *self._chunk_shape(size)), self._nothing().dtype)
            self._step(chunk, np.zeros(num_slots, np.int32))
        self.reset()

    def __repr__(self) -> str:
        parts = [
            presets.describe(self._config),
            f"{self._num_quantizers} used",
            summary.count(len(self._buffers), "slot"),
            f"chunks of {self._sizes} frames",
        ]
        if self._state is None:
            parts.append("closed")
        return f"{type(self).__name__}({', '.join(parts)})"

    def push(self, block: Any, sample_rate: int | None = None) -> Any:
        """Takes the next block, of any length, and returns what is complete.

        Args:
          block: For the only slot; or a dict, slot -> block, for several at once.
          sample_rate: Hz, if the caller knows it; nothing is resampled.

        Returns:
          What came out, with 0 frames or more; or a dict, slot -> what came out.

        Raises:
          ValueError: A wrong block or rate, a slot that does not exist or is finished, or that has
            come to the last frame that `StreamState` can count. No slot is changed.
        """
        wanted = self._config.sample_rate
        fits = isinstance(sample_rate, numbers.Real) and sample_rate == wanted
        if sample_rate is not None and not fits:
            raise ValueError(f"sample_rate must be {wanted} for this codec, got {sample_rate!r}")
        several = isinstance(block, Mapping)
        blocks = self._checked(block if several else {self._only_slot(): block})
        for slot, x in blocks.items():
            self._buffers[slot] = np.concatenate([self._buffers[slot], x], axis=-1)
        out = self._run(list(blocks))
        return out if several else out[0]

    def finish(self, slots: Iterable[int] | None = None) -> Any:
        """Ends streams and returns what is left in their buffers, the last frame padded with zeros.

        Args:
          slots: Which; default: the only one.

        Returns:
          As `push`: an array without `slots`, else a dict.
        """
        chosen = [self._only_slot()] if slots is None else self._check_slots(slots)
        self._finished[chosen] = True
        out = self._run(chosen)
        return out[0] if slots is None else out

    def reset(self, slots: Iterable[int] | None = None) -> None:
        """Begins streams anew, finished or not, with empty buffers; default: all.

        A `source` is begun anew too. After an interrupt within a step, reset all.
        """
        chosen = range(len(self._buffers)) if slots is None else slots
        chosen = self._check_slots(chosen, finished=True)
        mask = np.zeros(len(self._buffers), bool)
        mask[chosen] = True
        if mask.all() and self._state.position.is_deleted():  # lost in a step
            self._state = _init(self._codec, self._side, len(mask))
        self._state = reset_streams(self._state, mask)
        self._finished[chosen], self._num_frames[chosen] = False, 0
        if chosen:
            self._iterator = None
        for slot in chosen:
            self._buffers[slot] = self._nothing()

    def close(self) -> None:
        """Frees the state; nothing can be pushed any more."""
        self._state = None

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self):
        return self

    def __next__(self) -> np.ndarray:
        """What the next blocks of `source` give; at its end, what is left.

        A bad block is an error, as of `push`; what follows goes on with the next.
        """
        if self._source is None:
            raise ValueError("to iterate, give the stream a source of blocks")
        if self._iterator is None:
            self._iterator = iter(self._source)
        for block in self._iterator:
            if (out := self.push(block)).shape[-1]:
                return out
        if not self._finished[0] and (out := self.finish()).shape[-1]:
            return out
        raise StopIteration

    def _run(self, slots: list[int]) -> dict[int, np.ndarray]:
        """Computes all whole frames in the buffers, and of finished streams all that is left."""
        parts = {slot: [self._no_output()] for slot in slots}
        while most := max((self._ready(slot) for slot in slots), default=0):
            size = next((n for n in self._sizes if n >= most), self._sizes[-1])
            chunk = np.zeros((len(self._buffers), *self._chunk_shape(size)), self._nothing().dtype)
            lengths = np.zeros(len(self._buffers), np.int32)
            for slot in slots:
                taken = self._buffers[slot][..., : min(self._ready(slot), size) * self._unit]
                lengths[slot] = taken.shape[-1]
                chunk[slot, ..., : lengths[slot]] = taken
                self._buffers[slot] = self._buffers[slot][..., lengths[slot] :]
            out = self._step(chunk, lengths)
            for slot in slots:
                num_frames = -(-int(lengths[slot]) // self._unit)
                self._num_frames[slot] += num_frames
                parts[slot].append(out[slot, ..., : num_frames * out.shape[-1] // size])
        return {slot: np.concatenate(xs, axis=-1) for slot, xs in parts.items()}

    def _ready(self, slot: int) -> int:
        """Frames that can be computed."""
        size = self._buffers[slot].shape[-1]
        return -(-size // self._unit) if self._finished[slot] else size // self._unit

    def _only_slot(self) -> int:
        if len(self._buffers) > 1:
            raise ValueError(f"this stream has {len(self._buffers)} slots: say which, by a dict")
        return self._check_slots([0])[0]

    def _check_slots(self, slots: Iterable[int], finished: bool = False) -> list[int]:
        if self._state is None:
            raise ValueError("the stream is closed")
        try:
            slots, most = list(slots), len(self._buffers) - 1
        except TypeError as error:
            raise ValueError(f"slots must be a list of integers, got {slots!r}") from error
        for slot in slots:
            if not _is_integer(slot) or not 0 <= slot <= most:
                raise ValueError(f"slot must be 0..{most}, got {slot!r}")
            if self._finished[slot] and not finished:
                raise ValueError(f"the stream of slot {slot} is finished: reset it to begin anew")
        return list(dict.fromkeys(slots))

    def _checked(self, blocks: Mapping[int, Any]) -> dict[int, np.ndarray]:
        self._check_slots(blocks)
        found = {}
        for slot, block in blocks.items():
            try:
                found[slot] = self._check(np.asarray(block))
            except (ValueError, TypeError, RuntimeError) as error:  # of what is no array
                raise ValueError(f"slot {slot}: {error}") from error
            size = self._buffers[slot].shape[-1] + found[slot].shape[-1]
            if self._num_frames[slot] + size // self._unit >= self._most_frames:
                raise ValueError(
                    f"a stream has at most {self._most_frames} frames, that of slot {slot} would "
                    "have more: reset it to begin anew"
                )
        return found


def _sizes(chunk_frames: Sequence[int]) -> list[int]:
    """The sizes of chunks, smallest first."""
    sizes = list(chunk_frames) if isinstance(chunk_frames, Iterable) else []
    if not sizes or not all(_is_integer(n) and n >= 1 for n in sizes):
        raise ValueError(f"chunk_frames must be positive integers, got {chunk_frames!r}")
    return sorted({int(n) for n in sizes})


class EncoderStream(_Stream):
    """Audio in blocks of any length to codes.

        with EncoderStream(codec) as stream:
            for block in microphone:  # [C, S], any S
                send(stream.push(block))  # [Q, T], T = 0, 1, ... frames
            send(stream.finish())

    With a `source` of blocks it is an iterator over codes. Chunks of all sizes are compiled at the
    start. The codes are those of `encode` of the whole.
    """

    _side = "encoder"

    def _step(self, chunk: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self._state, out = encode_step(
            self._codec, self._state, chunk, lengths, self._num_quantizers
        )
        return np.asarray(out)

    def _chunk_shape(self, num_frames: int) -> tuple[int, int]:
        return self._config.num_channels, num_frames * self._unit

    def _nothing(self) -> np.ndarray:
        return np.zeros((self._config.num_channels, 0), np.float32)

    def _no_output(self) -> np.ndarray:
        return np.zeros((self._num_quantizers, 0), np.int32)

    def _check(self, wav: np.ndarray) -> np.ndarray:
        channels = self._config.num_channels
        hint = "use wav[None]" if wav.ndim == 1 and channels == 1 else ""
        if wav.ndim == 2 and wav.shape[1] == channels:
            hint = "use wav.T"
        check_shape("wav", wav, (channels, "S"), hint, may_be_empty=True)
        check_floating("wav", wav)
        check_samples("wav", wav)
        return wav.astype(np.float32)


class DecoderStream(_Stream):
    """Codes in blocks of any length to audio: `push` of [q, T] gives [C, T * hop_length].

    Otherwise like `EncoderStream`.
    """

    _side = "decoder"

    def _step(self, chunk: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self._state, out = decode_step(self._codec, self._state, chunk, lengths)
        return np.asarray(out)

    def _chunk_shape(self, num_frames: int) -> tuple[int, int]:
        return self._num_quantizers, num_frames

    def _nothing(self) -> np.ndarray:
        return np.zeros((self._num_quantizers, 0), np.int32)

    def _no_output(self) -> np.ndarray:
        return np.zeros((self._config.num_channels, 0), np.float32)

    def _check(self, codes: np.ndarray) -> np.ndarray:
        check_shape("codes", codes, (self._num_quantizers, "T"), may_be_empty=True)
        if codes.size:  # empty lists are of floats
            check_integers("codes", codes)
        check_code_range("codes", codes, self._config.quantizer.codebook_size)
        return codes.astype(np.int32)
