"""Batches of codes: batch number i is a pure function of the seed and i, packed by length.

Recordings are drawn in a shuffled order, source by source as their weights say. A window of some
batches is sorted by length and cut into batches, whose order is shuffled again. Which recordings a
batch holds follows from an index of all lengths, so a resumed run reads nothing twice, and every
process knows the shape of a batch without reading the rows of others.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
import tqdm

from moss_tok.audio import manifest
from moss_tok.audio.manifest import DOMAINS, TASKS
from moss_tok.codec.inference import bucket_frames
from moss_tok.data import sources
from moss_tok.data.codes import CodeSource, Item, LineSource, open_source
from moss_tok.data.config import CodeDataConfig
from moss_tok.language.text import Tokenizer

_WINDOW_BATCHES = 32  # that are packed together
_BUCKETS_PER_OCTAVE = 2  # lengths; a step is compiled for each
_SHORTEST = 16  # shorter batches are padded, which costs less than to compile more programs

Batch = dict[str, np.ndarray]
Source = CodeSource | LineSource
Member = tuple[int, ...]


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
        if item.metadata.get("split", "train") != split or not text:
            continue
        num_texts += 1
        size = item.codes.shape[1]
        if size <= shape.max_frames and len(shape.tokenizer.encode(text)) <= shape.max_text_tokens:
            indices.append(index)
            num_frames.append(size)
    return CodeSet(source, np.array(indices, int), np.array(num_frames, int), num_texts)


def find_sources(text: str) -> tuple[list[Source], list[float | None]]:
    """The sources of SOURCE[:WEIGHT],... and their weights; ValueError where one is no such."""
    names, weights = zip(*sources.parse(text), strict=True)
    return [open_source(name) for name in names], list(weights)


class PackedBatches:
    """The batches of a mixture, by number: a data source for grain.

    A subclass says what one item of a batch is. A member of a batch is a tuple of integers: the
    number of the set, the place in it, and what `draw` adds.
    """

    def __init__(
        self,
        sets: Sequence[Any],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
        rows: Sequence[int] | None = None,
    ):
        """Of these rows of each batch; default: all."""
        self._sets = tuple(sets)
        self._batch_size = batch_size
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

    def draw(self, part: int, place: int, number: int) -> Member:
        """The member for a recording; `number` counts all draws of the run."""
        del number
        return part, place

    def size(self, member: Member) -> int:
        """Its length, for the packing."""
        raise NotImplementedError

    def shape(self, members: Sequence[Member]) -> tuple[int, ...]:
        """The lengths of a batch's arrays."""
        raise NotImplementedError

    def read(self, member: Member) -> Any:
        """What `arrays` makes arrays of; raises an error if it cannot be read."""
        raise NotImplementedError

    def arrays(self, item: Any | None, shape: tuple[int, ...]) -> Batch:
        """The arrays of an item; None: one that could not be read."""
        raise NotImplementedError

    def members(self, number: int) -> list[Member]:
        """The members of a batch, shortest first."""
        window, place = divmod(number, _WINDOW_BATCHES)
        return self._window(window)[place]

    def _plan_window(self, window: int) -> list[list[Member]]:
        size = _WINDOW_BATCHES * self._batch_size
        numbers = range(window * size, (window + 1) * size)
        drawn = [self.draw(*self._order[number], number) for number in numbers]
        drawn.sort(key=self.size)
        batches = [drawn[i : i + self._batch_size] for i in range(0, size, self._batch_size)]
        order = np.random.default_rng((self._seed, window)).permutation(_WINDOW_BATCHES)
        return [batches[i] for i in order]

    def __getitem__(self, number: int) -> Batch:
        members = self.members(number)
        shape = self.shape(members)
        items = [self._item(members[row], shape) | {"position": np.int32(row)}
                 for row in self._rows]  # fmt: skip
        return {name: np.stack([item[name] for item in items]) for name in items[0]}

    def _item(self, member: Member, shape: tuple[int, ...]) -> Batch:
        failed = np.full((1, 2), -1, np.int64)
        item = None
        try:
            item = self.read(member)
        except Exception:  # what ArrayRecord and msgpack raise on damaged files
            part, place, *_ = member
            failed[0] = part, int(self._sets[part].indices[place])
        return {"failed": failed} | self.arrays(item, shape)


def bucket_size(members_size: int, most: int) -> int:
    """A length for the arrays of a batch: one of few, because a step is compiled for each."""
    return min(bucket_frames(max(members_size, _SHORTEST), _BUCKETS_PER_OCTAVE), most)


class CodeBatches(PackedBatches):
    """Batches of recordings, which are codes with a text.

    A recording that cannot be read becomes one of no frames and without text.
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
        """Of these rows of each batch; default: all."""
        super().__init__(sets, weights, batch_size, seed, rows)
        self._shape = shape

    def size(self, member: Member) -> int:
        """Frames."""
        part, place = member
        return int(self._sets[part].num_frames[place])

    def shape(self, members: Sequence[Member]) -> tuple[int, ...]:
        """T."""
        longest = max(map(self.size, members))
        return (bucket_size(longest, self._shape.max_frames),)

    def read(self, member: Member) -> Item:
        """The recording."""
        part, place = member
        return self._sets[part].source[int(self._sets[part].indices[place])]

    def arrays(self, item: Item | None, shape: tuple[int, ...]) -> Batch:
        """See `batches`."""
        (num_frames,) = shape
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
    return iterate(CodeBatches(sets, weights, config.batch_size, shape, seed, rows), start)


def iterate(made: PackedBatches, start: int) -> Iterator[Batch]:
    """Endless batches from number `start` on; the iterator has `close()`."""
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(grain.MapDataset.source(made)[start:].to_iter_dataset(options))
