"""Many recordings through an encoder, on all devices of this process.

Short ones go in batches of about one length. Long ones go side by side, each in a slot of a stream,
chunk by chunk, and the next takes the slot of one that has ended: so nothing is padded to the
length of another, and memory does not grow with the length.
"""

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
SLOT_SECONDS = 10.0  # of a long recording at once: of its last chunk half is padding, in the mean

# Recording -> its codes [Q, T] int16, and samples per channel.
Found = dict[str, tuple[np.ndarray, int]]
# A recording in blocks [C, S].
Blocks = Callable[[], Iterable[np.ndarray]]
# What is done with the codes of a batch, [Q, T] int16 of each row.
Take = Callable[[Sequence[np.ndarray]], None]


@dataclasses.dataclass
class Statistics:
    """What this process did.

    Attributes:
      audio_seconds: Encoded.
      padded_seconds: The same with padding, and slots that were idle.
      device_seconds: Time in which the devices had something to do.
      seconds: Time in all.
      shapes: How many batches of which (rows, frames).
    """

    audio_seconds: float = 0.0
    padded_seconds: float = 0.0
    device_seconds: float = 0.0
    seconds: float = 0.0
    shapes: collections.Counter = dataclasses.field(default_factory=collections.Counter)


class BatchEncoder:
    """Collects recordings until they fill a batch; one is computed while the next is read."""

    def __init__(self, codec: Codec, num_quantizers: int, batch_seconds: float):
        """Copies the codec to the devices; a batch has that much audio for each of them."""
        self._mesh = sharding.make_mesh("data:-1", jax.local_devices())
        self._rows = sharding.batch_sharding(self._mesh)
        params = jax.device_put(codec.params, sharding.replicated(self._mesh))
        self._codec, self._config = codec.replace(params=params), codec.config
        self._num_quantizers, self._seconds = num_quantizers, batch_seconds
        self._buckets: dict[int, list[tuple[str, np.ndarray]]] = collections.defaultdict(list)
        self._running: tuple[float, np.ndarray, Any, Future, Take] | None = None
        self._watch = ThreadPoolExecutor(1)  # sees when a batch is done, not when it is asked for
        self.statistics = Statistics()

    @property
    def batch_seconds(self) -> float:
        """Audio of a batch on all devices."""
        return self._seconds * self._mesh.size

    def add(self, key: str, wav: np.ndarray, found: Found) -> None:
        """Puts a recording [C, S] into a batch; a full one is computed. See `flush`."""
        size = inference.bucket_frames(self._config.num_frames(wav.shape[1]))
        self._buckets[size].append((key, wav))
        if len(self._buckets[size]) == self._batch_size(size):
            self._launch(size, self._buckets.pop(size), found)

    def flush(self, found: Found) -> None:
        """Computes what is left, in few shapes: a quarter of a batch, a sixteenth, ...

        What would leave devices without work goes on with the next longer ones, where that is less
        of a waste.
        """
        left, least, sizes = [], self._mesh.size, sorted(self._buckets)
        for size, longer in zip(sizes, [*sizes[1:], None], strict=False):
            bucket, left, rows = left + self._buckets[size], [], self._batch_size(size)
            while bucket:
                while rows > max(len(bucket), least):
                    rows = max(rows // 4 // least, 1) * least
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
        """Encodes recordings of any length, each as a stream.

        Args:
          recordings: Names, and what opens them; longest first leaves the fewest slots idle at the
            end.
          pool: Reads, a chunk ahead.
          found: Takes the codes.
          progress: Called with seconds of audio that are read.

        Returns:
          Those that could not be read, and why: ValueError or OSError.
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
        """For each device a power of 2: few where there are few recordings, of which one ends last.

        Eight for each slot keep the share of time low in which others have none.
        """
        most = min(num_recordings / 8 / self._mesh.size, self._seconds / SLOT_SECONDS)
        return self._mesh.size * 2 ** max(0, math.floor(math.log2(most)))

    def _compute(
        self, function: Callable[..., jax.Array], wav: np.ndarray, lengths: np.ndarray, take: Take
    ) -> None:
        """Starts a batch when the one before is done, whose codes are taken."""
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
        """Waits for the batch that is computed, if any."""
        if self._running is None:
            return
        began, lengths, out, ended, take = self._running
        self.statistics.device_seconds += ended.result() - began
        counts = [self._config.num_frames(int(length)) for length in lengths]
        rows = np.asarray(out).astype(np.int16)
        take([codes[:, :count] for codes, count in zip(rows, counts, strict=True)])
        self._running = None


def _batch(wavs: Sequence[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Audio [C, S] as [B, C, size] float32, and lengths [B]."""
    lengths = np.array([wav.shape[1] for wav in wavs], np.int32)
    return inference.stack(wavs, size).astype(np.float32, copy=False), lengths


class _Chunk(NamedTuple):
    """A part of a recording, and whether it is the first; without a key: nothing is left."""

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
    """When an array has been computed."""
    jax.block_until_ready(out)
    return time.perf_counter()
