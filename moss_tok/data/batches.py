"""Encodes many recordings on all devices of this process.

Short recordings are batched with others of about the same length. Long recordings are encoded
chunk by chunk as streams, several side by side; when one ends, the next takes its slot. So no long
recording is padded to the length of another, and memory does not grow with the length.
"""

import bisect
import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from moss_tok import sharding
from moss_tok.audio import files
from moss_tok.codec import inference
from moss_tok.codec.config import CodecConfig
from moss_tok.codec.inference import Codec
from moss_tok.codec.streaming import encode_step, init_encoder_stream, reset_streams

_LARGEST_BATCH = 64  # recordings per device
_COMPILE_SECONDS = 100.0  # of audio: encoding it takes about as long as compiling a program
SLOT_SECONDS = 10.0  # chunk of a long recording; on average half of its last chunk is padding

# Recording id -> codes [Q, T] int16, number of samples per channel.
CodesById = dict[str, tuple[np.ndarray, int]]
# Reads a recording in blocks [C, S].
Blocks = Callable[[], Iterable[np.ndarray]]
# Receives the codes of a batch, [Q, T] int16 per row.
_Store = Callable[[Sequence[np.ndarray]], None]


@dataclasses.dataclass
class Statistics:
    """The work of this process.

    Attributes:
      audio_seconds: Audio encoded.
      padded_seconds: Audio encoded, with padding and idle slots.
      device_seconds: Time during which the devices were busy.
      seconds: Total time.
      shapes: Number of batches by shape (rows, frames).
    """

    audio_seconds: float = 0.0
    padded_seconds: float = 0.0
    device_seconds: float = 0.0
    seconds: float = 0.0
    shapes: collections.Counter = dataclasses.field(default_factory=collections.Counter)


class _Running(NamedTuple):
    """A batch that the devices compute.

    Attributes:
      began: Time at which it was started.
      ended: Will hold the time at which it was done.
      lengths: Samples of each row, [B].
      codes: [B, Q, T].
      store: Receives the codes.
    """

    began: float
    ended: Future
    lengths: np.ndarray
    codes: jax.Array
    store: _Store


class BatchEncoder:
    """Collects recordings into batches; one batch is encoded while the next is read."""

    def __init__(self, codec: Codec, num_quantizers: int, batch_seconds: float):
        """Copies the codec to the devices; a device gets `batch_seconds` of audio per batch."""
        self._mesh = sharding.make_mesh("data:-1", jax.local_devices())
        self._rows = sharding.batch_sharding(self._mesh)
        params = jax.device_put(codec.params, sharding.replicated(self._mesh))
        self._codec = codec.replace(params=params)
        self._config = codec.config
        self._num_quantizers = num_quantizers
        self._device_batch_seconds = batch_seconds
        self._buckets: dict[int, list[tuple[str, np.ndarray]]] = collections.defaultdict(list)
        self._sizes: list[int] = []  # lengths of batches in frames; empty: `bucket_frames` decides
        self._running: _Running | None = None
        # Notes when a batch is done, not when its result is used.
        self._watch = ThreadPoolExecutor(1)
        self.statistics = Statistics()

    @property
    def batch_seconds(self) -> float:
        """Audio of a batch on all devices."""
        return self._device_batch_seconds * self._mesh.size

    def expect(self, seconds: Sequence[float]) -> None:
        """Chooses the lengths of batches for recordings that have about these lengths."""
        rate = self._config.frame_rate
        lengths = [max(1, math.ceil(length * rate)) for length in seconds]
        self._sizes = choose_sizes(lengths, _COMPILE_SECONDS * rate * self._mesh.size)

    def add(self, key: str, wav: np.ndarray, encoded: CodesById) -> None:
        """Adds a recording [C, S] to a batch. A full batch is encoded; `flush` encodes the others.

        Args:
          key: Id of the recording.
          wav: Its audio, [C, S].
          encoded: Receives the codes.
        """
        num_frames = inference.bucket_frames(self._config.num_frames(wav.shape[1]))
        index = bisect.bisect_left(self._sizes, num_frames)
        if index < len(self._sizes):
            num_frames = self._sizes[index]
        self._buckets[num_frames].append((key, wav))
        if len(self._buckets[num_frames]) == self._batch_size(num_frames):
            self._encode_bucket(num_frames, self._buckets.pop(num_frames), encoded)

    def flush(self, encoded: CodesById) -> None:
        """Encodes the remaining recordings in few shapes, see `inference.batch_rows`.

        Recordings join the next longer bucket when that padding costs less than empty rows.
        """
        remaining: list[tuple[str, np.ndarray]] = []
        sizes = sorted(self._buckets)
        for index, num_frames in enumerate(sizes):
            longer = sizes[index + 1] if index + 1 < len(sizes) else num_frames
            is_last = longer == num_frames
            bucket = remaining + self._buckets[num_frames]
            remaining = []
            while bucket:
                batch_size = self._batch_size(num_frames)
                num_rows = inference.batch_rows(len(bucket), batch_size, self._mesh.size)
                empty_frames = (num_rows - len(bucket)) * num_frames
                added_frames = len(bucket) * (longer - num_frames)
                if empty_frames > added_frames and not is_last:
                    remaining = bucket
                    break
                self._encode_bucket(num_frames, bucket[:num_rows], encoded, num_rows)
                bucket = bucket[num_rows:]
        self._buckets.clear()
        self._collect()

    def _batch_size(self, num_frames: int) -> int:
        """Rows of a full batch on all devices."""
        rows = int(self._device_batch_seconds * self._config.frame_rate / num_frames)
        return self._mesh.size * min(max(1, rows), _LARGEST_BATCH)

    def _encode_bucket(
        self,
        num_frames: int,
        bucket: list[tuple[str, np.ndarray]],
        encoded: CodesById,
        num_rows: int = 0,
    ) -> None:
        """Starts to encode recordings as one batch of at least `num_rows` rows of `num_frames`."""
        keys = [key for key, _ in bucket]
        wavs = [wav for _, wav in bucket]
        empty = np.zeros_like(wavs[0][:, :0])
        wavs += [empty] * (num_rows - len(bucket))
        wav, lengths = _batch(wavs, num_frames * self._config.hop_length)

        def encode(wav, lengths):
            return inference.encode(self._codec, wav, lengths, self._num_quantizers).codes

        def store(rows):
            for key, length, codes in zip(keys, lengths, rows, strict=False):
                encoded[key] = codes, int(length)

        self._compute(encode, wav, lengths, store)

    def encode_long(
        self,
        recordings: Sequence[tuple[str, Blocks]],
        pool: ThreadPoolExecutor,
        encoded: CodesById,
        progress: Callable[[float], Any] = lambda seconds: None,
    ) -> dict[str, Exception]:
        """Encodes recordings of any length as streams.

        Args:
          recordings: Ids, and functions that read the blocks. Longest first leaves the fewest slots
            idle at the end.
          pool: Threads that read one chunk ahead.
          encoded: Receives the codes.
          progress: Called with the seconds of audio that were read.

        Returns:
          The recordings that could not be read, with their ValueError or OSError.
        """
        if not recordings:
            return {}
        config = self._config
        slots = _Slots(config, recordings, self._num_slots(len(recordings)), pool)
        parts: dict[str | None, list[np.ndarray]] = collections.defaultdict(list)
        num_samples: collections.Counter = collections.Counter()
        state = init_encoder_stream(self._codec, slots.num_slots)

        def step(begins, wav, lengths):
            nonlocal state
            state = reset_streams(state, np.array(begins))
            state, codes = encode_step(self._codec, state, wav, lengths, self._num_quantizers)
            return codes

        def store(keys, rows):
            for key, codes in zip(keys, rows, strict=True):
                parts[key].append(codes)

        for chunks in slots.chunks():
            keys, wavs, begins = zip(*chunks, strict=True)
            wav, lengths = _batch(wavs, slots.chunk_samples)
            for key, length in zip(keys, lengths.tolist(), strict=True):
                num_samples[key] += length
            progress(lengths.sum() / config.sample_rate)
            step_chunks = functools.partial(step, begins)
            self._compute(step_chunks, wav, lengths, functools.partial(store, keys))
        self._collect()
        for key in parts.keys() - slots.errors.keys() - {_IDLE}:
            codes = np.concatenate(parts[key], axis=1)
            encoded[key] = codes, num_samples[key]
        return slots.errors

    def _num_slots(self, num_recordings: int) -> int:
        """Slots of all devices: a power of two per device, and at least eight recordings per slot.

        With fewer recordings per slot, most slots would be idle while the last one ends.
        """
        max_slots = min(
            num_recordings / 8 / self._mesh.size,
            self._device_batch_seconds / SLOT_SECONDS,
        )
        exponent = max(0, math.floor(math.log2(max_slots)))
        return self._mesh.size * 2**exponent

    def _compute(
        self,
        function: Callable[..., jax.Array],
        wav: np.ndarray,
        lengths: np.ndarray,
        store: _Store,
    ) -> None:
        """Waits for the previous batch, stores its codes, and starts this one."""
        placed = jax.device_put((wav, lengths), self._rows)
        self._collect()
        began = time.perf_counter()
        with jax.set_mesh(self._mesh):  # attention kernels read it
            codes = function(*placed)
        ended = self._watch.submit(_wait_until_ready, codes)
        self._running = _Running(began, ended, lengths, codes, store)
        num_samples = wav.shape[2]
        sample_rate = self._config.sample_rate
        self.statistics.audio_seconds += lengths.sum() / sample_rate
        self.statistics.padded_seconds += lengths.size * num_samples / sample_rate
        self.statistics.shapes[lengths.size, num_samples // self._config.hop_length] += 1

    def _collect(self) -> None:
        """Waits for the running batch, if any, and stores its codes."""
        if self._running is None:
            return
        batch = self._running
        self.statistics.device_seconds += batch.ended.result() - batch.began
        rows = []
        for codes, length in zip(np.asarray(batch.codes), batch.lengths, strict=True):
            num_frames = self._config.num_frames(int(length))
            rows.append(codes[:, :num_frames].astype(np.int16))
        batch.store(rows)
        self._running = None


def choose_sizes(lengths: Sequence[int], program_frames: float) -> list[int]:
    """Lengths of batches, shortest first, for recordings of these lengths, in frames.

    The lengths minimize the cost: the frames of padding, plus `program_frames` for each length,
    because each length needs a program of its own. So a few short recordings do not need a dozen
    programs, each of which takes seconds to compile.
    """
    counts = collections.Counter(inference.bucket_frames(length) for length in lengths)
    sizes = sorted(counts)
    # best[n]: the cost and the lengths of batches for the recordings of the first n sizes.
    best: list[tuple[float, list[int]]] = [(0.0, [])]
    for end in range(1, len(sizes) + 1):
        size = sizes[end - 1]
        padding = 0
        options = []
        for start in reversed(range(end)):
            padding += counts[sizes[start]] * (size - sizes[start])
            cost, chosen = best[start]
            options.append((cost + padding + program_frames, [*chosen, size]))
        best.append(min(options))
    return best[-1][1]


def _batch(wavs: Sequence[np.ndarray], num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Stacks audio [C, S] to [B, C, num_samples] float32; returns it and the lengths [B]."""
    lengths = np.array([wav.shape[1] for wav in wavs], np.int32)
    batch = inference.stack(wavs, num_samples)
    return batch.astype(np.float32, copy=False), lengths


def _wait_until_ready(array: jax.Array) -> float:
    """Waits until an array has been computed; returns the time."""
    jax.block_until_ready(array)
    return time.perf_counter()


class _Chunk(NamedTuple):
    """A part of a recording, and whether it is the first; `key` is _IDLE for an idle slot."""

    key: str | None
    wav: np.ndarray
    begins: bool


_IDLE = None  # key of the chunks of a slot without a recording


class _Slots:
    """Slots in which recordings are encoded chunk by chunk, one after the other.

    Attributes:
      num_slots: Number of slots.
      chunk_samples: Samples of a chunk, per channel.
      errors: Why recordings could not be read, by id.
    """

    def __init__(
        self,
        config: CodecConfig,
        recordings: Sequence[tuple[str, Blocks]],
        num_slots: int,
        pool: ThreadPoolExecutor,
    ):
        self.num_slots = num_slots
        self.chunk_samples = config.hop_length * max(1, round(SLOT_SECONDS * config.frame_rate))
        self.errors: dict[str, Exception] = {}
        self._waiting = iter(recordings)
        silence = np.zeros((config.num_channels, 0), np.float32)
        self._idle = _Chunk(_IDLE, silence, begins=False)
        self._pool = pool

    def chunks(self) -> Iterator[list[_Chunk]]:
        """Yields the next chunk of every slot until all slots are idle.

        Threads read the following chunks while the caller encodes these.
        """
        slots = [self._read_slot() for _ in range(self.num_slots)]
        futures = self._read_ahead(slots)
        while True:
            chunks = [future.result() for future in futures]
            if all(chunk is self._idle for chunk in chunks):
                return
            futures = self._read_ahead(slots)
            yield chunks

    def _read_ahead(self, slots: Sequence[Iterator[_Chunk]]) -> list[Future]:
        return [self._pool.submit(next, slot, self._idle) for slot in slots]

    def _read_slot(self) -> Iterator[_Chunk]:
        """The chunks of one recording after the other."""
        for key, blocks in self._waiting:
            begins = True
            try:
                for wav in files.rechunk(blocks(), self.chunk_samples):
                    yield _Chunk(key, wav, begins)
                    begins = False
            except (ValueError, OSError) as error:
                self.errors[key] = error
