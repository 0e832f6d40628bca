"""The training pipeline: batch number i is a pure function of the seed and i.

So the data position is one integer, the number of batches consumed, and a resumed run sees the same
batches as an undisturbed one, with any number of threads, workers or processes. Nothing after the
shuffle filters: an item that is silent or cannot be read is replaced by draws that depend on its
index alone.
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
from moss_tok.audio.manifest import DOMAINS, TASKS
from moss_tok.data.config import AudioDataConfig
from moss_tok.data.sources import Mixture, Source
from moss_tok.language.text import Tokenizer

_LINGER_SECONDS = 120.0
_TRIES = 8  # draws for an item before a silent one is taken, or padding where none can be read

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class SegmentShape:
    """What segments are cut into.

    Attributes:
      num_samples: S, per channel.
      sample_rate: Hz.
      num_channels: C.
      tokenizer: For texts; None: none are made.
      max_text_tokens: Longest text; a segment with a longer one counts as without.
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
        index, wav, text = int(element), None, ("", TASKS[0])
        domain = "other"
        failed = np.full((_TRIES, 2), -1, np.int64)
        for attempt in range(_TRIES):
            try:
                wav, domain, text = self._read(index, rng)
            except (ValueError, OSError):
                failed[attempt] = self._number, index
            else:
                if files.level_db(wav) >= self._config.silence_db:
                    break
            index = int(rng.integers(len(self._source)))
        if wav is None:
            wav = np.zeros((self._shape.num_channels, 0), np.float32)
        wav = self._augment(wav, rng)
        padding = self._shape.num_samples - wav.shape[-1]
        tokens = {} if self._shape.tokenizer is None else self._tokens(*text)
        return tokens | {
            "wav": np.pad(wav, ((0, 0), (0, padding))),
            "length": np.int32(wav.shape[-1]),
            "domain": np.int32(DOMAINS.index(domain if domain in DOMAINS else "other")),
            "failed": failed,
        }

    def _tokens(self, text: str, task: str) -> Batch:
        limit = self._shape.max_text_tokens
        tokens = self._shape.tokenizer.encode(text)
        if len(tokens) > limit:
            tokens = []
        return {
            "text": np.pad(np.array(tokens, np.int32), (0, limit - len(tokens))),
            "text_length": np.int32(len(tokens)),
            "task": np.int32(TASKS.index(task)),
        }

    def _read(
        self, index: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, str, tuple[str, str]]:
        """Audio, domain, text and task; no text where the segment is a part of the recording."""
        recording = self._source[index]
        rate = self._shape.sample_rate
        if self._config.augment_speed:
            speed = 1 + rng.uniform(-self._config.augment_speed, self._config.augment_speed)
            rate = round(rate / speed)  # the rate that it is read at; it is treated as the old one
        seconds = self._shape.num_samples / rate
        start = rng.uniform(0, max(0.0, recording.duration_seconds - seconds))
        wav = files.read_segment(recording.audio, start, seconds, rate)
        wav = files.to_channels(wav, self._shape.num_channels)[:, : self._shape.num_samples]
        if self._config.augment_shift_seconds:
            room = self._config.augment_shift_seconds * self._shape.sample_rate
            room = min(self._shape.num_samples - wav.shape[1], round(room))
            wav = np.pad(wav, ((0, 0), (int(rng.integers(room + 1)), 0)))
        text = recording.text if recording.duration_seconds <= seconds else ""
        return wav, recording.domain, (text, recording.task)

    def _augment(self, wav: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Changes the sound, then the level, as far as the peak stays within full scale."""
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
        change = rng.uniform(-gain_db, gain_db)
        if loudness:
            change += rng.uniform(*loudness) - files.level_db(wav)
        return wav * np.float32(min(10 ** (change / 20), max(1.0, 1 / np.abs(wav).max())))


def _equalize(
    wav: np.ndarray, sample_rate: int, most_db: float, rng: np.random.Generator
) -> np.ndarray:
    """Random gains an octave apart, linear in between, without a delay; wav [C, S]."""
    octaves = np.log2(np.maximum(np.fft.rfftfreq(wav.shape[1], 1 / sample_rate), 1.0))
    edges = np.arange(np.ceil(np.log2(sample_rate / 2)), 4, -1)[::-1]  # from 32 Hz on
    gains_db = np.interp(octaves, edges, rng.uniform(-most_db, most_db, len(edges)))
    return _filtered(wav, 10 ** (gains_db / 20))


def _add_noise(wav: np.ndarray, ratio_db: float, rng: np.random.Generator) -> np.ndarray:
    """Noise, of a colour between white and pink, that much below the mean power of wav [C, S]."""
    noise = rng.standard_normal(wav.shape, np.float32)
    bins = np.maximum(np.arange(wav.shape[1] // 2 + 1), 1.0)
    noise = _filtered(noise, bins ** rng.uniform(-0.5, 0.0))
    power, noise_power = (np.mean(np.square(x, dtype=np.float64)) for x in (wav, noise))
    return wav + noise * np.float32(np.sqrt(power / noise_power) * 10 ** (-ratio_db / 20))


def _filtered(wav: np.ndarray, gains: np.ndarray) -> np.ndarray:
    spectrum = np.fft.rfft(wav, axis=1) * gains
    return np.fft.irfft(spectrum, wav.shape[1], axis=1).astype(np.float32)


class _Rows:
    """The items of some rows of each batch, as a source."""

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
    """Ends a worker process when its parent is gone, however that ended."""
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
      config: batch_size, augmentation, num_workers.
      mixture: What to draw from; within a source of files, longer ones are drawn more often.
      shape: What segments are cut into.
      seed: Of the order and of what is drawn.
      start: Batches already consumed.
      rows: Which rows of each batch to make; default: all.

    Returns:
      Iterator over {"wav": float32 [B, C, S], zero past "length": int32 [B]; "domain": int32 [B],
      indices into DOMAINS; "position": int32 [B], places in the global batch; "failed": [B, 8, 2],
      (source, index) of what could not be read on the way to each item, -1 where nothing}. With a
      tokenizer also {"text": int32 [B, max_text_tokens]; "text_length": int32 [B], 0 where there
      is none; "task": int32 [B], indices into TASKS}. It has `close()`.
    """
    parts = []
    for number, source in enumerate(mixture.sources):
        segment = Segment(config, mixture.sources, number, shape)
        indices = grain.MapDataset.range(len(source)).seed(seed + number)
        parts.append(indices.shuffle().repeat().random_map(segment))
    dataset = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, mixture.weights)

    def place(index: int, item: Batch) -> Batch:
        return item | {"position": np.int32(index % config.batch_size)}

    dataset = dataset.map_with_index(place)
    if rows is not None and len(rows) < config.batch_size:
        dataset = grain.MapDataset.source(_Rows(dataset, config.batch_size, rows))
    dataset = dataset.batch(len(rows or range(config.batch_size)))[start:]
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
