"""The base of the streaming classes: a buffer per slot, and chunks of the compiled sizes."""

import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np

from moss_tok import summary
from moss_tok.codec import presets
from moss_tok.codec.checks import check_count, check_part, is_whole
from moss_tok.codec.inference import Codec
from moss_tok.codec.streaming import StreamState, init_stream, reset_streams

CHUNK_FRAMES = (1, 2, 4, 8)


class BufferedStream:
    """The base of both classes: a buffer per slot, processed in chunks of the compiled sizes.

    All slots run together in a chunk. A slot contributes the complete frames in its buffer.
    """

    _side: str

    def _step(self, chunk: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Computes a chunk of all slots [N, ...], and keeps the state after it."""
        raise NotImplementedError

    def _chunk_shape(self, num_frames: int) -> tuple[int, int]:
        """The shape of one slot's input of `num_frames` frames."""
        raise NotImplementedError

    def _empty_input(self) -> np.ndarray:
        raise NotImplementedError

    def _empty_output(self) -> np.ndarray:
        raise NotImplementedError

    def _check(self, block: np.ndarray, /) -> np.ndarray:
        """A block with the type of the input; ValueError if it cannot be one."""
        raise NotImplementedError

    def __init__(
        self,
        codec: Codec,
        num_quantizers: int | None = None,
        num_slots: int = 1,
        chunk_frames: Sequence[int] = CHUNK_FRAMES,
        source: Iterable[np.ndarray] | None = None,
    ) -> None:
        """Creates a stream in each slot and compiles all chunk sizes.

        Args:
          codec: A codec with an encoder (`EncoderStream`) or a decoder (`DecoderStream`).
          num_quantizers: Number of codes per frame, 1..Q, the most significant ones first;
            default: Q.
          num_slots: Number of independent streams, computed together.
          chunk_frames: Numbers of frames that may be computed at once. Input is split into chunks
            of these sizes; larger ones are faster.
          source: Blocks for the only slot, to iterate over the results.

        Raises:
          ValueError: An argument is out of range, a source is given for several slots, the codec
            was loaded without this side, or its parameters are spread over several processes.
        """
        check_count("num_slots", num_slots)
        if source is not None and not isinstance(source, Iterable):
            raise ValueError(f"source must be an iterable of blocks, got {source!r}")
        if source is not None and num_slots > 1:
            raise ValueError(f"source needs num_slots=1, got {num_slots}: use push for each slot")
        sizes = _chunk_sizes(chunk_frames)
        self._num_quantizers = codec.config.check_num_quantizers(num_quantizers)
        # Input entries of one frame.
        self._unit = codec.config.hop_length if self._side == "encoder" else 1
        self._codec = codec
        self._config = codec.config
        self._sizes = sizes
        self._source = source
        check_part(codec, self._side)
        if not getattr(jax.tree.leaves(codec.params)[0], "is_fully_addressable", True):
            raise ValueError(
                f"{type(self).__name__} needs parameters on the devices of one process, these are "
                f"on several: call {self._side[:-1]}_step with global arrays"
            )
        self._state: StreamState | None = init_stream(codec, self._side, num_slots)
        self._buffers = [self._empty_input()] * num_slots
        self._finished = np.zeros(num_slots, bool)
        self._num_frames = np.zeros(num_slots, int)  # computed so far
        highest_rate = max(codec.config.stage_rates(self._side))
        positions_per_frame = round(highest_rate / codec.config.frame_rate)
        self._max_frames = (2**31 - 1) // positions_per_frame - sizes[-1]  # see `StreamState`
        self._iterator: Iterator[np.ndarray] | None = None
        for size in sizes:  # with all slots paused, this only compiles
            self._step(self._empty_chunk(size), np.zeros(num_slots, np.int32))
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
        """Takes the next block and returns the results of all frames that it completes.

        Args:
          block: The next block, of any length; or, for several slots, a dict of blocks by slot.
          sample_rate: Hz, to check the audio's rate against the codec's; nothing is resampled.

        Returns:
          The result, of 0 or more frames; or, for a dict of blocks, a dict of results by slot.

        Raises:
          ValueError: A block has the wrong shape, type or values, the rate is wrong, a slot does
            not exist or is finished, or a stream would get longer than `StreamState` can count. No
            slot is changed.
        """
        codec_rate = self._config.sample_rate
        is_codec_rate = isinstance(sample_rate, numbers.Real) and sample_rate == codec_rate
        if sample_rate is not None and not is_codec_rate:
            raise ValueError(
                f"sample_rate must be {codec_rate} for this codec, got {sample_rate!r}"
            )
        if isinstance(block, Mapping):
            return self._push(block)
        slot = self._only_slot()
        return self._push({slot: block})[slot]

    def _push(self, blocks: Mapping[int, Any]) -> dict[int, np.ndarray]:
        arrays = self._check_blocks(blocks)
        for slot, array in arrays.items():
            self._buffers[slot] = np.concatenate([self._buffers[slot], array], axis=-1)
        return self._run(list(arrays))

    def finish(self, slots: Iterable[int] | None = None) -> Any:
        """Ends streams; a partly filled last frame is padded with zeros.

        Args:
          slots: The slots whose streams end; default: the only slot.

        Returns:
          The result of the samples still in the buffer; or, with `slots`, a dict of results by
          slot.

        Raises:
          ValueError: A slot does not exist or is finished already, or `slots` is missing for a
            stream with several slots.
        """
        ended = [self._only_slot()] if slots is None else self._check_slots(slots)
        self._finished[ended] = True
        results = self._run(ended)
        return results[0] if slots is None else results

    def reset(self, slots: Iterable[int] | None = None) -> None:
        """Starts new streams, with empty buffers, whether the old ones are finished or not.

        A `source` is iterated from its start again. If a step was interrupted, for example by
        KeyboardInterrupt, its state is lost: reset all slots.

        Args:
          slots: The slots to reset; default: all.

        Raises:
          ValueError: A slot does not exist, or the stream is closed.
        """
        restarted = range(len(self._buffers)) if slots is None else slots
        restarted = self._check_slots(restarted, may_be_finished=True)
        mask = np.zeros(len(self._buffers), bool)
        mask[restarted] = True
        state = self._open_state()
        if mask.all() and state.position.is_deleted():  # by an interrupted step
            state = init_stream(self._codec, self._side, len(mask))
        self._state = reset_streams(state, mask)
        self._finished[restarted] = False
        self._num_frames[restarted] = 0
        if restarted:
            self._iterator = None
        for slot in restarted:
            self._buffers[slot] = self._empty_input()

    def close(self) -> None:
        """Frees the state; the stream cannot be used afterwards."""
        self._state = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> np.ndarray:
        """The next non-empty result from the blocks of `source`; at its end, that of `finish`.

        A bad block raises the error of `push`; the next call continues with the block after it.
        """
        if self._source is None:
            raise ValueError("iteration needs a source: pass source=BLOCKS to the constructor")
        if self._iterator is None:
            self._iterator = iter(self._source)
        for block in self._iterator:
            result = self.push(block)
            if result.shape[-1]:
                return result
        if not self._finished[0]:
            result = self.finish()
            if result.shape[-1]:
                return result
        raise StopIteration

    def _run(self, slots: list[int]) -> dict[int, np.ndarray]:
        """Computes the frames that are ready in the buffers of `slots`; the results by slot."""
        parts = {slot: [self._empty_output()] for slot in slots}
        while True:
            max_ready = max(map(self._num_ready, slots), default=0)
            if max_ready == 0:
                break
            size = self._chunk_size(max_ready)
            chunk, lengths = self._take_chunk(slots, size)
            out = self._step(chunk, lengths)
            out_unit = out.shape[-1] // size
            for slot in slots:
                num_frames = -(-int(lengths[slot]) // self._unit)
                self._num_frames[slot] += num_frames
                parts[slot].append(out[slot, ..., : num_frames * out_unit])
        return {slot: np.concatenate(arrays, axis=-1) for slot, arrays in parts.items()}

    def _chunk_size(self, num_frames: int) -> int:
        """The smallest chunk size of at least `num_frames`; the largest size if none is."""
        for size in self._sizes:
            if size >= num_frames:
                return size
        return self._sizes[-1]

    def _empty_chunk(self, size: int) -> np.ndarray:
        shape = (len(self._buffers), *self._chunk_shape(size))
        return np.zeros(shape, self._empty_input().dtype)

    def _take_chunk(self, slots: list[int], size: int) -> tuple[np.ndarray, np.ndarray]:
        """Moves up to `size` ready frames of each slot from its buffer to a chunk.

        Returns:
          The chunk, and the valid entries of each slot.
        """
        chunk = self._empty_chunk(size)
        lengths = np.zeros(len(self._buffers), np.int32)
        for slot in slots:
            buffer = self._buffers[slot]
            num_frames = min(self._num_ready(slot), size)
            ready = buffer[..., : num_frames * self._unit]
            length = ready.shape[-1]
            lengths[slot] = length
            chunk[slot, ..., :length] = ready
            self._buffers[slot] = buffer[..., length:]
        return chunk, lengths

    def _num_ready(self, slot: int) -> int:
        """Frames that can be computed: complete ones, and a partial last one once finished."""
        size = self._buffers[slot].shape[-1]
        if self._finished[slot]:
            return -(-size // self._unit)  # rounded up
        return size // self._unit

    def _only_slot(self) -> int:
        if len(self._buffers) > 1:
            raise ValueError(
                f"this stream has {len(self._buffers)} slots: push a dict of blocks by slot, and "
                "give finish a list of slots"
            )
        return self._check_slots([0])[0]

    def _check_slots(self, slots: Iterable[int], may_be_finished: bool = False) -> list[int]:
        """Returns `slots` as a list without repetitions; ValueError if one cannot be used."""
        self._open_state()
        try:
            listed = list(slots)
        except TypeError as error:
            raise ValueError(f"slots must be a list of integers, got {slots!r}") from error
        last = len(self._buffers) - 1
        for slot in listed:
            if not is_whole(slot) or not 0 <= slot <= last:
                raise ValueError(f"slot must be 0..{last}, got {slot!r}")
            if self._finished[slot] and not may_be_finished:
                raise ValueError(
                    f"the stream of slot {slot} is finished: reset the slot to start a new one"
                )
        return list(dict.fromkeys(listed))

    def _open_state(self) -> StreamState:
        """The state; ValueError after `close`."""
        if self._state is None:
            raise ValueError("the stream is closed")
        return self._state

    def _check_blocks(self, blocks: Mapping[int, Any]) -> dict[int, np.ndarray]:
        """Returns the blocks as arrays. Raises a ValueError that names the slot of a bad one."""
        self._check_slots(blocks)
        arrays = {}
        for slot, block in blocks.items():
            try:
                array = self._check(np.asarray(block))
            except (ValueError, TypeError, RuntimeError) as error:  # np.asarray raises all of them
                raise ValueError(f"slot {slot}: {error}") from error
            size = self._buffers[slot].shape[-1] + array.shape[-1]
            if self._num_frames[slot] + size // self._unit >= self._max_frames:
                raise ValueError(
                    f"a stream has at most {self._max_frames} frames, slot {slot} would have more: "
                    "reset the slot to start a new stream"
                )
            arrays[slot] = array
        return arrays


def _chunk_sizes(chunk_frames: Sequence[int]) -> list[int]:
    """The distinct chunk sizes in frames, smallest first."""
    sizes = list(chunk_frames) if isinstance(chunk_frames, Iterable) else []
    if not sizes or not all(is_whole(n) and n >= 1 for n in sizes):
        raise ValueError(f"chunk_frames must be positive integers, got {chunk_frames!r}")
    return sorted({int(n) for n in sizes})
