"""The training pipeline: batch number i is a pure function of the seed and i.

So the data position is one integer, the number of batches consumed, and a resumed run sees what an
undisturbed one would have, under any number of threads.
"""

from collections.abc import Iterator, Sequence
from typing import SupportsIndex

import grain
import numpy as np

from moss_tok.audio import files
from moss_tok.audio.manifest import AudioItem


class SegmentSource:
    """Random access to (item, segment): each item counts once per started segment of its length."""

    def __init__(self, items: Sequence[AudioItem], segment_seconds: float):
        counts = [max(1, int(item.duration_seconds // segment_seconds)) for item in items]
        self._items = list(items)
        self._owners = np.repeat(np.arange(len(items)), counts)

    def __len__(self) -> int:
        return len(self._owners)

    def __getitem__(self, index: SupportsIndex) -> AudioItem:
        return self._items[self._owners[index]]

    def __repr__(self) -> str:
        return f"SegmentSource(items={len(self._items)}, segments={len(self)})"


class RandomCrop(grain.transforms.RandomMap):
    """Cuts a random segment out of a file, reading only what it needs."""

    def __init__(self, num_samples: int, sample_rate: int, num_channels: int):
        self._num_samples = num_samples
        self._sample_rate = sample_rate
        self._num_channels = num_channels

    def random_map(self, element: AudioItem, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns `wav` [C, S] float32, zero-padded, and `length`, its valid samples."""
        seconds = self._num_samples / self._sample_rate
        start = rng.uniform(0, max(0.0, element.duration_seconds - seconds))
        wav = files.read_segment(element.path, start, seconds, self._sample_rate)
        wav = files.to_channels(wav, self._num_channels)[:, : self._num_samples]
        padding = self._num_samples - wav.shape[-1]
        length = np.int32(wav.shape[-1])
        return {"wav": np.pad(wav, ((0, 0), (0, padding))), "length": length}


def batches(
    items: Sequence[AudioItem],
    *,
    batch_size: int,
    num_samples: int,
    sample_rate: int,
    num_channels: int,
    seed: int,
    start: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches from number `start` on.

    Args:
      items: What to draw from; longer files are drawn more often.
      batch_size: B.
      num_samples: S, samples per segment and channel.
      sample_rate: Hz.
      num_channels: C.
      seed: Of order and crops.
      start: Batches already consumed.

    Returns:
      Iterator over {"wav": float32 [B, C, S], "length": int32 [B]}.
    """
    dataset = (
        grain.MapDataset.source(SegmentSource(items, num_samples / sample_rate))
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(RandomCrop(num_samples, sample_rate, num_channels))
        .batch(batch_size)
    )
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(dataset[start:].to_iter_dataset(options))
