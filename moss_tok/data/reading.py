"""Reads the recordings of a shard in threads, ahead of the encoder that takes them."""

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from moss_tok.audio import files
from moss_tok.audio.manifest import AudioItem
from moss_tok.codec import inference
from moss_tok.codec.inference import Codec
from moss_tok.data import sources
from moss_tok.data.batches import BatchEncoder, Blocks, CodesById

Items = Sequence[tuple[str, AudioItem]]  # recordings with their ids
Errors = dict[str, Exception]  # why recordings could not be read, by id

_MAX_AHEAD = 1000  # recordings read ahead; some may be longer than their metadata says
_BATCHES_AHEAD = 3  # of the encoder, in seconds of audio


def read_item(item: AudioItem, sample_rate: int, num_channels: int) -> np.ndarray:
    """The audio [C, S] of an item, as `moss-tok encode` reads it."""
    recording = sources.open_item(item)
    return files.read(recording.audio, sample_rate, num_channels)


class _Pending(NamedTuple):
    """A recording that a thread reads; `audio` is None for a long one, which is read later."""

    item_id: str
    item: AudioItem
    audio: Future | None


class Reader:
    """Reads recordings ahead of an encoder, and has them encoded."""

    def __init__(self, codec: Codec, pool: ThreadPoolExecutor, progress: Callable[[float], Any]):
        """Reads with the threads of `pool`; calls `progress` with the seconds that were read."""
        self._sample_rate = codec.config.sample_rate
        self._num_channels = codec.config.num_channels
        self._pool = pool
        self._progress = progress

    def encode(self, encoder: BatchEncoder, items: Items) -> tuple[CodesById, Errors]:
        """The codes of the recordings that can be read, and the errors of the others."""
        encoded: CodesById = {}
        errors: Errors = {}
        long_recordings: list[tuple[str, Blocks]] = []
        for pending in self._read_ahead(_BATCHES_AHEAD * encoder.batch_seconds, items):
            wav = None
            if pending.audio is not None:
                try:
                    wav = pending.audio.result()
                except (ValueError, OSError) as error:
                    errors[pending.item_id] = error
                    self._progress(pending.item.duration_seconds)
                    continue
            if wav is None or inference.is_long(wav.shape[1] / self._sample_rate):
                blocks = functools.partial(self._read_blocks, pending.item)
                long_recordings.append((pending.item_id, blocks))
            else:
                encoder.add(pending.item_id, wav, encoded)
                self._progress(pending.item.duration_seconds)
        encoder.flush(encoded)
        longest_first = long_recordings[::-1]
        errors |= encoder.encode_long(longest_first, self._pool, encoded, self._progress)
        return encoded, errors

    def _read_ahead(self, max_seconds: float, items: Items) -> Iterator[_Pending]:
        """Yields recordings in order; threads read up to `max_seconds` of audio ahead."""
        queue: collections.deque[_Pending] = collections.deque()
        seconds_ahead = 0.0
        for item_id, item in items:
            audio = None
            if not inference.is_long(item.duration_seconds):
                audio = self._pool.submit(read_item, item, self._sample_rate, self._num_channels)
                seconds_ahead += item.duration_seconds
            queue.append(_Pending(item_id, item, audio))
            while queue and (seconds_ahead > max_seconds or len(queue) > _MAX_AHEAD):
                first = queue.popleft()
                if first.audio is not None:
                    seconds_ahead -= first.item.duration_seconds
                yield first
        yield from queue

    def _read_blocks(self, item: AudioItem) -> Iterator[np.ndarray]:
        audio = sources.open_item(item).audio
        return files.read_blocks(
            audio, self._sample_rate, self._num_channels, inference.CHUNK_SECONDS
        )
