"""Encodes many recordings on all devices of this process.

Short recordings are batched with others of about the same length. Long recordings are encoded
chunk by chunk as streams, several side by side; when one ends, the next takes its slot. So no long
recording is padded to the length of another, and memory does not grow with the length.
"""

import bisect
import collections
import dataclasses
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
from moss_tok.codec.inference import Codec
from moss_tok.codec.streaming import encode_step, init_encoder_stream, reset_streams

_LARGEST_BATCH = 64  # recordings per device
_COMPILE_SECONDS = 300.0  # compiling a program takes as long as encoding that much audio, or longer
SLOT_SECONDS = 10.0  # chunk of a long recording; on average half of its last chunk is padding

# By recording: its codes [Q, T] int16, and its samples per channel.
Found = dict[str, tuple[np.ndarray, int]]
# A recording in blocks [C, S].
Blocks = Callable[[], Iterable[np.ndarray]]
# Receives the codes of a batch, [Q, T] int16 per row.
Take = Callable[[Sequence[np.ndarray]], None]


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


class BatchEncoder:
    """Collects recordings into batches; one batch is encoded while the next is read."""

    def __init__(self, codec: Codec, num_quantizers: int, batch_seconds: float):
        """Copies the codec to the devices; a device gets `batch_seconds` of audio per batch."""
        self._mesh = sharding.make_mesh("data:-1", jax.local_devices())
        self._rows = sharding.batch_sharding(self._mesh)
        params = jax.device_put(codec.params, sharding.replicated(self._mesh))
        self._codec, self._config = codec.replace(params=params), codec.config
        self._num_quantizers, self._seconds = num_quantizers, batch_seconds
        self._buckets: dict[int, list[tuple[str, np.ndarray]]] = collections.defaultdict(list)
        self._sizes: list[int] = []
        self._running: tuple[float, np.ndarray, Any, Future, Take] | None = None
        # Notes when a batch is done, not when its result is used.
        self._watch = ThreadPoolExecutor(1)
        self.statistics = Statistics()

    @property
    def batch_seconds(self) -> float:
        """Audio of a batch on all devices."""
        return self._seconds * self._mesh.size

    def expect(self, seconds: Sequence[float]) -> None:
        """Chooses the lengths of batches for recordings that have about these lengths."""
        rate = self._config.frame_rate
        lengths = [max(1, math.ceil(length * rate)) for length in seconds]
        self._sizes = choose_sizes(lengths, _COMPILE_SECONDS * rate * self._mesh.size)

    def add(self, key: str, wav: np.ndarray, found: Found) -> None:
        """Adds a recording [C, S] to a batch, which is encoded once it is full. See `flush`."""
        size = inference.bucket_frames(self._config.num_frames(wav.shape[1]))
        place = bisect.bisect_left(self._sizes, size)
        if place < len(self._sizes):
            size = self._sizes[place]
        self._buckets[size].append((key, wav))
        if len(self._buckets[size]) == self._batch_size(size):
            self._launch(size, self._buckets.pop(size), found)

    def flush(self, found: Found) -> None:
        """Encodes the remaining recordings in few shapes, see `inference.batch_rows`.

        Recordings join the next longer bucket when that padding costs less than empty rows.
        """
        left: list[tuple[str, np.ndarray]] = []
        sizes = sorted(self._buckets)
        for size, longer in zip(sizes, [*sizes[1:], None], strict=False):  # no sizes: [None]
            bucket = [*left, *self._buckets[size]]
            left = []
            full = self._batch_size(size)
            while bucket:
                rows = inference.batch_rows(len(bucket), full, self._mesh.size)
                missing = rows - len(bucket)
                if longer and missing * size > len(bucket) * (longer - size):
                    left = bucket
                    break
                self._launch(size, bucket[:rows], found, rows)
                bucket = bucket[rows:]
        self._buckets.clear()
        self._collect()

    def _batch_size(self, size: int) -> int:
        rows = int(self._seconds * self._config.frame_rate / size)
        return self._mesh.size * min(max(1, rows), _LARGEST_BATCH)

    def _launch(
        self, size: int, bucket: list[tuple[str, np.ndarray]], found: Found, rows: int = 0
    ) -> None:
        keys, wavs = zip(*bucket, strict=True)
        nothing = [np.zeros_like(wavs[0][:, :0])] * (rows - len(bucket))
        wav, lengths = _batch([*wavs, *nothing], size * self._config.hop_length)

        def take(rows):
            for key, length, codes in zip(keys, lengths, rows, strict=False):
                found[key] = codes, int(length)

        def encode(wav, lengths):
            return inference.encode(self._codec, wav, lengths, self._num_quantizers).codes

        self._compute(encode, wav, lengths, take)

    def encode_long(
        self,
        recordings: Sequence[tuple[str, Blocks]],
        pool: ThreadPoolExecutor,
        found: Found,
        progress: Callable[[float], Any] = lambda seconds: None,
    ) -> dict[str, Exception]:
        """Encodes recordings of any length as streams.

        Args:
          recordings: Names, and functions that read the blocks. Longest first leaves the fewest
            slots idle at the end.
          pool: Threads that read one chunk ahead.
          found: Receives the codes.
          progress: Called with the seconds of audio that were read.

        Returns:
          The recordings that could not be read, with their ValueError or OSError.
        """
        if not recordings:
            return {}
        c, num_slots = self._config, self._num_slots(len(recordings))
        size = c.hop_length * max(1, round(SLOT_SECONDS * c.frame_rate))
        waiting, failed = iter(recordings), {}
        idle = _Chunk(None, np.zeros((c.num_channels, 0), np.float32), False)
        feeds = [_chunks_of_slot(waiting, size, failed) for _ in range(num_slots)]
        ahead = [pool.submit(next, feed, idle) for feed in feeds]
        parts: dict[str | None, list[np.ndarray]] = collections.defaultdict(list)
        num_samples: collections.Counter = collections.Counter()
        state = init_encoder_stream(self._codec, num_slots)
        while (chunks := [future.result() for future in ahead]) != [idle] * num_slots:
            ahead = [pool.submit(next, feed, idle) for feed in feeds]
            keys, wavs, begins = zip(*chunks, strict=True)
            wav, lengths = _batch(wavs, size)
            num_samples.update(dict(zip(keys, lengths.tolist(), strict=True)))
            progress(lengths.sum() / c.sample_rate)

            def take(rows, keys=keys):
                for key, codes in zip(keys, rows, strict=True):
                    parts[key].append(codes)

            def step(wav, lengths, begins=begins):
                nonlocal state
                state = reset_streams(state, np.array(begins))
                state, codes = encode_step(self._codec, state, wav, lengths, self._num_quantizers)
                return codes

            self._compute(step, wav, lengths, take)
        self._collect()
        for key in parts.keys() - failed.keys() - {idle.key}:
            found[key] = np.concatenate(parts[key], axis=1), num_samples[key]
        return failed

    def _num_slots(self, num_recordings: int) -> int:
        """Slots of all devices: a power of two per device, and at least eight recordings per slot.

        With fewer recordings per slot, most slots would be idle while the last one ends.
        """
        most = min(num_recordings / 8 / self._mesh.size, self._seconds / SLOT_SECONDS)
        return self._mesh.size * 2 ** max(0, math.floor(math.log2(most)))

    def _compute(
        self, function: Callable[..., jax.Array], wav: np.ndarray, lengths: np.ndarray, take: Take
    ) -> None:
        """Waits for the batch before, takes its codes, and starts this one."""
        placed = jax.device_put((wav, lengths), self._rows)
        self._collect()
        began = time.perf_counter()
        with jax.set_mesh(self._mesh):  # kernels ask for it
            out = function(*placed)
        self._running = began, lengths, out, self._watch.submit(_time_of, out), take
        self.statistics.audio_seconds += lengths.sum() / self._config.sample_rate
        self.statistics.padded_seconds += lengths.size * wav.shape[2] / self._config.sample_rate
        self.statistics.shapes[lengths.size, wav.shape[2] // self._config.hop_length] += 1

    def _collect(self) -> None:
        """Waits for the batch that is running, if any, and takes its codes."""
        if self._running is None:
            return
        began, lengths, out, ended, take = self._running
        self.statistics.device_seconds += ended.result() - began
        counts = [self._config.num_frames(int(length)) for length in lengths]
        rows = np.asarray(out).astype(np.int16)
        take([codes[:, :count] for codes, count in zip(rows, counts, strict=True)])
        self._running = None


def choose_sizes(lengths: Sequence[int], program_frames: float) -> list[int]:
    """Lengths of batches, shortest first, for recordings of these lengths, in frames.

    They minimize the frames of padding plus `program_frames` for each length, because each needs
    a program of its own. So few short recordings are not encoded by a dozen programs, each of which
    takes seconds to compile.
    """
    counts = collections.Counter(inference.bucket_frames(length) for length in lengths)
    sizes = sorted(counts)
    # Cost and lengths for the recordings of the first n sizes.
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


def _batch(wavs: Sequence[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Audio [C, S] as [B, C, size] float32, and lengths [B]."""
    lengths = np.array([wav.shape[1] for wav in wavs], np.int32)
    return inference.stack(wavs, size).astype(np.float32, copy=False), lengths


class _Chunk(NamedTuple):
    """A part of a recording, and whether it is the first. Without a key the slot is idle."""

    key: str | None
    wav: np.ndarray
    begins: bool


def _chunks_of_slot(
    waiting: Iterator[tuple[str, Blocks]], size: int, failed: dict[str, Exception]
) -> Iterator[_Chunk]:
    """Chunks of `size` samples of one recording after the other."""
    for key, blocks in waiting:
        begins = True
        try:
            for chunk in files.rechunk(blocks(), size):
                yield _Chunk(key, chunk, begins)
                begins = False
        except (ValueError, OSError) as error:
            failed[key] = error


def _time_of(out: jax.Array) -> float:
    """The time at which an array has been computed."""
    jax.block_until_ready(out)
    return time.perf_counter()
