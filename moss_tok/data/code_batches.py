"""Batches of codes: batch number i is a pure function of the seed and i, packed by length.

Recordings are drawn in a shuffled order, source by source as their weights say. A window of some
batches is sorted by length and cut into batches, whose order is shuffled again. Which recordings a
batch holds follows from an index of all lengths, so a resumed run reads nothing twice, and every
process knows the shape of a batch without reading the rows of others.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import grain
import numpy as np
import tqdm

from moss_tok.audio import manifest
from moss_tok.audio.manifest import DOMAINS, TASKS
from moss_tok.codec.inference import bucket_frames
from moss_tok.data import sources
from moss_tok.data.codes import CodeSource, Item
from moss_tok.data.config import CodeDataConfig
from moss_tok.language.text import Tokenizer

_WINDOW_BATCHES = 32  # that are packed together
_BUCKETS_PER_OCTAVE = 2  # lengths; a step is compiled for each

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class CodeShape:
    """What recordings are made into.

    Attributes:
      num_quantizers: Q of the codec; recordings with fewer are padded.
      max_frames: Longest recording; longer ones are not used.
      frame_rate: Frames per second.
      tokenizer: For texts.
      max_text_tokens: Longest text; recordings with a longer one are not used.
    """

    num_quantizers: int
    max_frames: int
    frame_rate: float
    tokenizer: Tokenizer
    max_text_tokens: int


@dataclasses.dataclass(frozen=True)
class CodeSet:
    """The recordings of one split of a source that have a text and are short enough.

    Attributes:
      source: All recordings.
      indices: Which of them.
      num_frames: Length of each of these.
      num_texts: How many of the split have a text.
    """

    source: CodeSource
    indices: np.ndarray
    num_frames: np.ndarray
    num_texts: int

    def __len__(self) -> int:
        return len(self.indices)


def read_set(source: CodeSource, split: str, shape: CodeShape) -> CodeSet:
    """Reads all recordings once to learn their lengths, splits and texts; shows progress."""
    indices = []
    num_frames = []
    num_texts = 0
    for index, item in enumerate(tqdm.tqdm(source, f"indexing {source.folder}", disable=None)):
        text, _ = manifest.read_text(item.metadata)
        if item.metadata.get("split", "train") != split or not text:
            continue
        num_texts += 1
        size = item.codes.shape[1]
        if size <= shape.max_frames and len(shape.tokenizer.encode(text)) <= shape.max_text_tokens:
            indices.append(index)
            num_frames.append(size)
    return CodeSet(source, np.array(indices, int), np.array(num_frames, int), num_texts)


def find_sources(text: str) -> tuple[list[CodeSource], list[float | None]]:
    """The folders of SOURCE[:WEIGHT],... and their weights; ValueError where one is no such."""
    names, weights = zip(*sources.parse(text), strict=True)
    return [CodeSource(name) for name in names], list(weights)


class CodeBatches:
    """The batches of a mixture, by number: a data source for grain."""

    def __init__(
        self,
        sets: Sequence[CodeSet],
        weights: Sequence[float],
        batch_size: int,
        shape: CodeShape,
        seed: int,
        rows: Sequence[int] | None = None,
    ):
        """Of these rows of each batch; default: all."""
        self._sets = tuple(sets)
        self._batch_size = batch_size
        self._shape = shape
        self._seed = seed
        self._rows = range(batch_size) if rows is None else rows
        parts = []
        for number, part in enumerate(sets):
            indices = grain.MapDataset.range(len(part)).seed(seed + number).shuffle().repeat()
            parts.append(indices.map(functools.partial(_numbered, number)))
        self._order = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)
        self._window = functools.lru_cache(maxsize=4)(self._plan_window)

    def __len__(self) -> int:
        return len(self._order) // self._batch_size

    def members(self, number: int) -> list[tuple[int, int]]:
        """The recordings of a batch: (number of the set, place in it), shortest first."""
        window, place = divmod(number, _WINDOW_BATCHES)
        return self._window(window)[place]

    def _plan_window(self, window: int) -> list[list[tuple[int, int]]]:
        size = _WINDOW_BATCHES * self._batch_size
        drawn = [self._order[window * size + i] for i in range(size)]
        drawn.sort(key=lambda pair: self._sets[pair[0]].num_frames[pair[1]])
        batches = [drawn[i : i + self._batch_size] for i in range(0, size, self._batch_size)]
        order = np.random.default_rng((self._seed, window)).permutation(_WINDOW_BATCHES)
        return [batches[i] for i in order]

    def __getitem__(self, number: int) -> Batch:
        members = self.members(number)
        longest = max(self._sets[part].num_frames[place] for part, place in members)
        bucket = bucket_frames(int(longest), _BUCKETS_PER_OCTAVE)
        num_frames = min(bucket, self._shape.max_frames)
        items = [self._item(*members[row], num_frames) | {"position": np.int32(row)}
                 for row in self._rows]  # fmt: skip
        return {name: np.stack([item[name] for item in items]) for name in items[0]}

    def _item(self, part: int, place: int, num_frames: int) -> Batch:
        """A recording, or, where it cannot be read, one of no frames and without text."""
        index = int(self._sets[part].indices[place])
        failed = np.full((1, 2), -1, np.int64)
        item = None
        try:
            item = self._sets[part].source[index]
        except Exception:  # what ArrayRecord and msgpack raise on damaged files
            failed[0] = part, index
        return {"failed": failed} | self._arrays(item, num_frames)

    def _arrays(self, item: Item | None, num_frames: int) -> Batch:
        shape = self._shape
        codes = np.zeros((shape.num_quantizers, num_frames), np.int32)
        tokens: list[int] = []
        task, domain, size, num_quantizers = TASKS[0], "other", 0, 1
        if item is not None:
            num_quantizers, size = item.codes.shape
            codes[:num_quantizers, :size] = item.codes
            text, task = manifest.read_text(item.metadata)
            tokens = shape.tokenizer.encode(text)
            domain = str(item.metadata.get("domain"))
        padding = shape.max_text_tokens - len(tokens)
        return {
            "codes": codes,
            "length": np.int32(size),
            "num_quantizers": np.int32(num_quantizers),
            "domain": np.int32(DOMAINS.index(domain if domain in DOMAINS else "other")),
            "text": np.pad(np.array(tokens, np.int32), (0, padding)),
            "text_length": np.int32(len(tokens)),
            "task": np.int32(TASKS.index(task)),
        }


def _numbered(number: int, index: int) -> tuple[int, int]:
    return number, int(index)


def batches(
    config: CodeDataConfig,
    sets: Sequence[CodeSet],
    weights: Sequence[float],
    shape: CodeShape,
    seed: int = 0,
    start: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Endless batches from number `start` on.

    Args:
      config: batch_size.
      sets: What to draw from.
      weights: The share of each.
      shape: What recordings are made into.
      seed: Of the order.
      start: Batches already consumed.
      rows: Which rows of each batch to make; default: all.

    Returns:
      Iterator over {"codes": int32 [B, Q, T], zero past "length" and "num_quantizers": int32 [B];
      T is one of few sizes; "domain", "position", "failed", "text", "text_length", "task": as
      `pipeline.batches` has them}. It has `close()`.
    """
    made = CodeBatches(sets, weights, config.batch_size, shape, seed, rows)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(grain.MapDataset.source(made)[start:].to_iter_dataset(options))
