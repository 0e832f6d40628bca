"""Batches of codes: batch number i is a pure function of the seed and i, packed by length.

Each source is shuffled, and recordings are drawn from the sources in proportion to their weights.
A window of some batches is sorted by length and cut into batches, whose order is shuffled again.
An index of all lengths determines which recordings a batch has. So a resumed run reads nothing
twice, and every process knows the shape of a batch without reading the rows of other processes.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
import tqdm

from moss_tok.audio import manifest
from moss_tok.audio.manifest import TASKS
from moss_tok.codec.inference import bucket_frames
from moss_tok.data import sources
from moss_tok.data.codes import CodeSource, Item, LineSource, open_source
from moss_tok.data.config import CodeDataConfig
from moss_tok.language.text import Tokenizer

_WINDOW_BATCHES = 32  # number of batches that are packed together
_BUCKETS_PER_OCTAVE = 2  # lengths per octave; a step is compiled for each
_MIN_LENGTH = 16  # shorter batches are padded, which costs less than to compile more programs

Batch = dict[str, np.ndarray]
Source = CodeSource | LineSource
Member = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class CodeShape:
    """The sizes of batches of codes, and the limits of the recordings in them.

    Attributes:
      num_quantizers: Q of the codec; recordings with fewer are padded.
      max_frames: Longest recording; longer ones are not used.
      frame_rate: Frames per second.
      tokenizer: Tokenizer of the texts.
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
      source: All recordings of the source.
      indices: Index in `source` of each recording of the set.
      num_frames: Frames of each recording of the set.
      num_texts: Number of recordings of the split with a text.
    """

    source: Source
    indices: np.ndarray
    num_frames: np.ndarray
    num_texts: int

    def __len__(self) -> int:
        return len(self.indices)


def read_set(source: Source, split: str, shape: CodeShape) -> CodeSet:
    """Reads all recordings once to learn their lengths, splits and texts; shows progress."""
    indices = []
    num_frames = []
    num_texts = 0
    for index, item in enumerate(tqdm.tqdm(source, f"indexing {source.folder}", disable=None)):
        text, _ = manifest.read_text(item.metadata)
        if (item.metadata.get("split") or "train") != split or not text:
            continue
        num_texts += 1
        item_frames = item.codes.shape[1]
        num_tokens = len(shape.tokenizer.encode(text))
        if item_frames <= shape.max_frames and num_tokens <= shape.max_text_tokens:
            indices.append(index)
            num_frames.append(item_frames)
    return CodeSet(
        source=source,
        indices=np.array(indices, int),
        num_frames=np.array(num_frames, int),
        num_texts=num_texts,
    )


def find_sources(text: str) -> tuple[list[Source], list[float | None]]:
    """The sources of SOURCE[:WEIGHT],... and their weights.

    Raises:
      ValueError: A source has no codes.
    """
    opened = []
    weights = []
    for name, weight in sources.parse(text):
        opened.append(open_source(name))
        weights.append(weight)
    return opened, weights


class PackedBatches:
    """The batches of a mixture, by number: a data source for grain.

    A subclass defines the items of a batch. A member of a batch is a tuple of integers: the number
    of the set, the index of a recording in the set, and any others that `draw` adds.
    """

    def __init__(
        self,
        sets: Sequence[Any],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
        rows: Sequence[int] | None = None,
    ):
        """The batches that mix `sets` by `weights`; of each, the given rows (default: all)."""
        self._sets = tuple(sets)
        self._batch_size = batch_size
        self._seed = seed
        self._rows = range(batch_size) if rows is None else rows
        parts = []
        for set_number, part in enumerate(sets):
            indices = grain.MapDataset.range(len(part)).seed(seed + set_number)
            add_number = functools.partial(_add_set_number, set_number)
            parts.append(indices.shuffle().repeat().map(add_number))
        self._order = parts[0]
        if len(parts) > 1:
            self._order = grain.MapDataset.mix(parts, weights)
        self._window = functools.lru_cache(maxsize=4)(self._plan_window)

    def __len__(self) -> int:
        return len(self._order) // self._batch_size

    def draw(self, set_number: int, index: int, draw_number: int) -> Member:
        """The member for a recording of a set; `draw_number` counts all draws of the run."""
        del draw_number
        return set_number, index

    def size(self, member: Member) -> int:
        """The length of a member, by which members are packed."""
        raise NotImplementedError

    def shape(self, members: Sequence[Member]) -> tuple[int, ...]:
        """The lengths of a batch's arrays."""
        raise NotImplementedError

    def read(self, member: Member) -> Any:
        """The item of a member. Raises an error if it cannot be read."""
        raise NotImplementedError

    def arrays(self, item: Any | None, shape: tuple[int, ...]) -> Batch:
        """The arrays of an item; `item` is None if it could not be read."""
        raise NotImplementedError

    def members(self, number: int) -> list[Member]:
        """The members of a batch, shortest first."""
        window, index = divmod(number, _WINDOW_BATCHES)
        return self._window(window)[index]

    def _plan_window(self, window: int) -> list[list[Member]]:
        """The batches of a window."""
        size = _WINDOW_BATCHES * self._batch_size
        members = []
        for draw_number in range(window * size, (window + 1) * size):
            set_number, index = self._order[draw_number]
            members.append(self.draw(set_number, index, draw_number))
        members.sort(key=self.size)
        batches = []
        order = np.random.default_rng((self._seed, window)).permutation(_WINDOW_BATCHES)
        for number in order:
            start = number * self._batch_size
            batches.append(members[start : start + self._batch_size])
        return batches

    def __getitem__(self, number: int) -> Batch:
        members = self.members(number)
        shape = self.shape(members)
        rows = []
        for row in self._rows:
            arrays = self._read_arrays(members[row], shape)
            rows.append(arrays | {"position": np.int32(row)})
        batch = {}
        for name in rows[0]:
            batch[name] = np.stack([arrays[name] for arrays in rows])
        return batch

    def _read_arrays(self, member: Member, shape: tuple[int, ...]) -> Batch:
        failed = np.full((1, 2), -1, np.int64)
        item = None
        try:
            item = self.read(member)
        except Exception:  # ArrayRecord and msgpack raise many types on damaged files
            set_number, index, *_ = member
            failed[0] = set_number, int(self._sets[set_number].indices[index])
        return {"failed": failed} | self.arrays(item, shape)


def bucket_size(length: int, max_length: int) -> int:
    """The length of a batch's arrays for members of up to `length`.

    It is one of a few lengths, because a step is compiled for each.
    """
    return min(bucket_frames(max(length, _MIN_LENGTH), _BUCKETS_PER_OCTAVE), max_length)


class CodeBatches(PackedBatches):
    """Batches of recordings, which are codes with a text.

    A recording that cannot be read becomes one without frames and text.
    """

    def __init__(
        self,
        sets: Sequence[CodeSet],
        weights: Sequence[float],
        batch_size: int,
        shape: CodeShape,
        seed: int,
        rows: Sequence[int] | None = None,
    ):
        """As `PackedBatches`, with arrays of the sizes in `shape`."""
        super().__init__(sets, weights, batch_size, seed, rows)
        self._shape = shape

    def size(self, member: Member) -> int:
        """Number of frames."""
        set_number, index = member
        return int(self._sets[set_number].num_frames[index])

    def shape(self, members: Sequence[Member]) -> tuple[int, ...]:
        """(T,)."""
        longest = max(map(self.size, members))
        return (bucket_size(longest, self._shape.max_frames),)

    def read(self, member: Member) -> Item:
        """The recording."""
        set_number, index = member
        recordings = self._sets[set_number]
        return recordings.source[int(recordings.indices[index])]

    def arrays(self, item: Item | None, shape: tuple[int, ...]) -> Batch:
        """See `batches`."""
        (padded_frames,) = shape
        codes = np.zeros((self._shape.num_quantizers, padded_frames), np.int32)
        tokens: list[int] = []
        task = TASKS[0]
        domain = "other"
        num_frames = 0
        num_quantizers = 1
        if item is not None:
            num_quantizers, num_frames = item.codes.shape
            codes[:num_quantizers, :num_frames] = item.codes
            text, task = manifest.read_text(item.metadata)
            tokens = self._shape.tokenizer.encode(text)
            domain = str(item.metadata.get("domain"))
        padding = self._shape.max_text_tokens - len(tokens)
        return {
            "codes": codes,
            "length": np.int32(num_frames),
            "num_quantizers": np.int32(num_quantizers),
            "domain": np.int32(manifest.domain_index(domain)),
            "text": np.pad(np.array(tokens, np.int32), (0, padding)),
            "text_length": np.int32(len(tokens)),
            "task": np.int32(TASKS.index(task)),
        }


def _add_set_number(set_number: int, index: int) -> tuple[int, int]:
    return set_number, int(index)


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
      config: Only `batch_size` is used.
      sets: Recordings to draw from.
      weights: The share of each set.
      shape: Sizes of the arrays.
      seed: Seed of the order.
      start: Number of batches already consumed.
      rows: Rows of each batch to make; default: all.

    Returns:
      Iterator over {"codes": int32 [B, Q, T], zero past "length" and "num_quantizers": int32 [B];
      T is one of few sizes; "domain", "position", "failed", "text", "text_length", "task": as in
      `pipeline.batches`}. It has `close()`.
    """
    packed = CodeBatches(sets, weights, config.batch_size, shape, seed, rows)
    return iterate(packed, start)


def iterate(packed: PackedBatches, start: int) -> Iterator[Batch]:
    """Endless batches from number `start` on; the iterator has `close()`."""
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    dataset = grain.MapDataset.source(packed)[start:]
    return iter(dataset.to_iter_dataset(options))
