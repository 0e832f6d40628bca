"""Streams for programs that hold samples, not frames: classes that buffer, over the pure steps."""

import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moss_tok import summary
from moss_tok.codec import presets
from moss_tok.codec.checks import (
    check_code_range,
    check_count,
    check_floating,
    check_integers,
    check_part,
    check_samples,
    check_shape,
    is_whole,
)
from moss_tok.codec.inference import Codec
from moss_tok.codec.streaming import (
    decode_step,
    encode_step,
    init_stream,
    reset_streams,
)

CHUNK_FRAMES = (1, 2, 4, 8)


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
        check_count("num_slots", num_slots)
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
        self._state = init_stream(codec, self._side, num_slots)
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
            self._state = init_stream(self._codec, self._side, len(mask))
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
            if not is_whole(slot) or not 0 <= slot <= most:
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
    if not sizes or not all(is_whole(n) and n >= 1 for n in sizes):
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
