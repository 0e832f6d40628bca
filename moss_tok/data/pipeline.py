"""The training pipeline: batch number i is a pure function of the seed and i.

So the data position is one integer, the number of batches consumed. A resumed run sees the same
batches as a run without interruption, with any number of threads, workers or processes. No item is
filtered out after the shuffle: if an item is silent or cannot be read, another one is drawn, and
that draw depends only on the index of the first one.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from moss_tok.audio import files, notes
from moss_tok.audio.manifest import TASKS, domain_index
from moss_tok.data.config import AudioDataConfig
from moss_tok.data.sources import Mixture, Source
from moss_tok.language.text import Tokenizer

_LINGER_SECONDS = 120.0  # during which a worker works on after SIGTERM
_TRIES = 8  # draws for an item; then a silent one is used, or padding if none could be read
_ENDLESS = 2**62  # batches

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class SegmentShape:
    """The sizes of the arrays of segments.

    Attributes:
      num_samples: S, per channel.
      sample_rate: Hz.
      num_channels: C.
      tokenizer: Tokenizer of the texts; None: batches have no texts.
      max_text_tokens: Longest text; a longer text is left out.
    """

    num_samples: int
    sample_rate: int
    num_channels: int
    tokenizer: Tokenizer | None = None
    max_text_tokens: int = 0


class Segment(grain.transforms.RandomMap):
    """Turns an index into a random segment of that item, and reads no more than the segment."""

    def __init__(
        self,
        config: AudioDataConfig,
        sources: tuple[Source, ...],
        number: int,
        shape: SegmentShape,
    ):
        self._config = config
        self._number = number
        self._source = sources[number]
        self._shape = shape

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        _end_with_parent()
        _outlive_sigterm()

    def random_map(self, element: int, rng: np.random.Generator) -> Batch:
        """An item of a batch, see `batches`."""
        index = int(element)
        segment = _ReadSegment(np.zeros((self._shape.num_channels, 0), np.float32))
        failed = np.full((_TRIES, 2), -1, np.int64)
        for attempt in range(_TRIES):
            try:
                segment = self._read(index, rng)
            except (ValueError, OSError):
                failed[attempt] = self._number, index
            else:
                if files.level_db(segment.wav) >= self._config.silence_db:
                    break
            index = int(rng.integers(len(self._source)))
        wav = self._augment(segment.wav, rng)
        padding = self._shape.num_samples - wav.shape[-1]
        arrays = {
            "wav": np.pad(wav, ((0, 0), (0, padding))),
            "length": np.int32(wav.shape[-1]),
            "domain": np.int32(domain_index(segment.domain)),
            "failed": failed,
        }
        if self._shape.tokenizer is not None:
            arrays |= self._tokens(segment.text, segment.task)
        return arrays

    def _tokens(self, text: str, task: str) -> Batch:
        max_tokens = self._shape.max_text_tokens
        tokens = self._shape.tokenizer.encode(text)
        if len(tokens) > max_tokens:
            tokens = []
        padding = max_tokens - len(tokens)
        return {
            "text": np.pad(np.array(tokens, np.int32), (0, padding)),
            "text_length": np.int32(len(tokens)),
            "task": np.int32(TASKS.index(task)),
        }

    def _read(self, index: int, rng: np.random.Generator) -> "_ReadSegment":
        """Reads a random segment of an item, or all of it if it is shorter."""
        recording = self._source[index]
        num_samples = self._shape.num_samples
        rate = self._shape.sample_rate
        if self._config.augment_speed:
            speed = 1 + rng.uniform(-self._config.augment_speed, self._config.augment_speed)
            # Resampled to this rate and played at sample_rate, the segment changes its speed.
            rate = round(rate / speed)
        seconds = num_samples / rate
        start = rng.uniform(0, max(0.0, recording.duration_seconds - seconds))
        wav = files.read_segment(recording.audio, start, seconds, rate)
        wav = files.to_channels(wav, self._shape.num_channels)[:, :num_samples]
        if self._config.augment_shift_seconds:
            max_shift = round(self._config.augment_shift_seconds * self._shape.sample_rate)
            max_shift = min(num_samples - wav.shape[1], max_shift)
            shift = int(rng.integers(max_shift + 1))
            wav = np.pad(wav, ((0, 0), (shift, 0)))
        is_whole = recording.duration_seconds <= seconds
        text = recording.text if is_whole else ""
        return _ReadSegment(wav, recording.domain, text, recording.task)

    def _augment(self, wav: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Changes the sound, then the level; a gain never lifts the peak above full scale."""
        equalizer_db = self._config.augment_equalizer_db
        noise = self._config.augment_noise_db
        gain_db = self._config.augment_gain_db
        loudness = self._config.augment_loudness_db
        if not (equalizer_db or noise or gain_db or loudness) or not wav.any():
            return wav
        peak = max(1.0, np.abs(wav).max())
        if equalizer_db:
            wav = _equalize(wav, self._shape.sample_rate, equalizer_db, rng)
        if noise:
            wav = _add_noise(wav, rng.uniform(*noise), rng)
        if equalizer_db or noise:
            wav = wav * np.float32(min(1.0, peak / np.abs(wav).max()))
        if not (gain_db or loudness):
            return wav
        change_db = rng.uniform(-gain_db, gain_db)
        if loudness:
            change_db += rng.uniform(*loudness) - files.level_db(wav)
        max_gain = max(1.0, 1 / np.abs(wav).max())
        return wav * np.float32(min(10 ** (change_db / 20), max_gain))


@dataclasses.dataclass(frozen=True)
class _ReadSegment:
    """Audio [C, S] of a recording, S at most that of a batch; `text` is "" for a part of one."""

    wav: np.ndarray
    domain: str = "other"
    text: str = ""
    task: str = TASKS[0]


def _equalize(
    wav: np.ndarray,
    sample_rate: int,
    max_db: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Applies random gains an octave apart, linear in between, without a delay; wav [C, S]."""
    frequencies = np.fft.rfftfreq(wav.shape[1], 1 / sample_rate)
    octaves = np.log2(np.maximum(frequencies, 1.0))
    highest = np.ceil(np.log2(sample_rate / 2))
    edges = np.arange(highest, 4, -1)[::-1]  # from 32 Hz on
    edge_gains_db = rng.uniform(-max_db, max_db, len(edges))
    gains_db = np.interp(octaves, edges, edge_gains_db)
    return _filter(wav, 10 ** (gains_db / 20))


def _add_noise(wav: np.ndarray, ratio_db: float, rng: np.random.Generator) -> np.ndarray:
    """Adds noise between white and pink, `ratio_db` below the mean power of wav [C, S]."""
    noise = rng.standard_normal(wav.shape, np.float32)
    bins = np.maximum(np.arange(wav.shape[1] // 2 + 1), 1.0)
    noise = _filter(noise, bins ** rng.uniform(-0.5, 0.0))
    same_power = np.sqrt(_mean_power(wav) / _mean_power(noise))
    amplitude = same_power * 10 ** (-ratio_db / 20)
    return wav + noise * np.float32(amplitude)


def _mean_power(wav: np.ndarray) -> float:
    return np.mean(np.square(wav, dtype=np.float64))


def _filter(wav: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Multiplies the spectrum of wav [C, S] by gains [S // 2 + 1]."""
    spectrum = np.fft.rfft(wav, axis=1) * gains
    filtered = np.fft.irfft(spectrum, wav.shape[1], axis=1)
    return filtered.astype(np.float32)


class _Rows:
    """A data source with the items of some rows of each batch."""

    def __init__(self, dataset: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        self._dataset = dataset
        self._batch_size = batch_size
        self._rows = rows

    def __len__(self) -> int:
        return len(self._dataset) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        batch, row = divmod(index, len(self._rows))
        return self._dataset[batch * self._batch_size + self._rows[row]]


def _end_with_parent() -> None:
    """Ends a worker process when its parent has ended for any reason."""
    parent = multiprocessing.parent_process()
    if parent is None or getattr(_end_with_parent, "watching", False):
        return
    _end_with_parent.watching = True

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _outlive_sigterm() -> None:
    """Keeps a worker process alive for a while after SIGTERM: the parent still needs batches."""

    def linger(*_: object) -> None:
        timer = threading.Timer(_LINGER_SECONDS, os._exit, (1,))
        timer.daemon = True
        timer.start()

    if multiprocessing.parent_process() is not None:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, linger)


def batches(
    config: AudioDataConfig,
    mixture: Mixture,
    shape: SegmentShape,
    seed: int = 0,
    start: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Endless batches from number `start` on.

    Args:
      config: Batch size, augmentation and number of workers.
      mixture: Sources to draw from; within a source of files, longer files are drawn more often.
      shape: Sizes of the arrays.
      seed: Seed of the order and of all random draws.
      start: Number of batches already consumed.
      rows: Rows of each batch to make; default: all.

    Returns:
      Iterator over {"wav": float32 [B, C, S], zero past "length": int32 [B]; "domain": int32 [B],
      indices into DOMAINS; "position": int32 [B], rows of the global batch; "failed": [B, 8, 2],
      (source, index) of items that could not be read in an attempt, else -1}. With a tokenizer
      also {"text": int32 [B, max_text_tokens]; "text_length": int32 [B], 0 without a text; "task":
      int32 [B], indices into TASKS}. It has `close()`.
    """
    parts = []
    for number, source in enumerate(mixture.sources):
        segment = Segment(config, mixture.sources, number, shape)
        indices = grain.MapDataset.range(len(source)).seed(seed + number)
        parts.append(indices.shuffle().repeat().random_map(segment))
    dataset = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, mixture.weights)

    def add_position(index: int, item: Batch) -> Batch:
        return item | {"position": np.int32(index % config.batch_size)}

    dataset = dataset.map_with_index(add_position)
    if rows is not None and len(rows) < config.batch_size:
        dataset = grain.MapDataset.source(_Rows(dataset, config.batch_size, rows))
    # The length of an endless dataset is sys.maxsize, which grain rounds up for batches of one.
    dataset = dataset[:_ENDLESS].batch(len(rows or range(config.batch_size)))[start:]
    if not config.num_workers:
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
        return iter(dataset.to_iter_dataset(options))
    _mark_flags_as_parsed()
    notes.share_with_workers()
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    workers = grain.MultiprocessingOptions(config.num_workers, per_worker_buffer_size=2)
    return iter(dataset.to_iter_dataset(options).mp_prefetch(workers))


def _mark_flags_as_parsed() -> None:
    """Grain's workers take over absl's flags, which nobody parses outside train.py."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
