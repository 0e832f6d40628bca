"""Sources of training data: files and ArrayRecord shards of audio, and mixtures of them."""

import dataclasses
import glob
import re
from collections.abc import Sequence

import numpy as np

from moss_tok import storage
from moss_tok.audio import files, manifest
from moss_tok.audio.manifest import TASKS, AudioItem
from moss_tok.data import records

_SHARD_NAME = re.compile(r"(\w+)-\d+-of-\d+\.array_record")


@dataclasses.dataclass(frozen=True)
class Recording:
    """Audio to cut a segment from.

    Attributes:
      audio: File name or bytes.
      domain: As in `AudioItem`.
      duration_seconds: Length.
      text: Its transcript or caption; "" if unknown.
      task: The kind of text, one of TASKS.
    """

    audio: storage.Path | files.AudioBytes
    domain: str
    duration_seconds: float
    text: str = ""
    task: str = TASKS[0]


class FileSource:
    """Random access to segments of files: an item counts once per whole segment of its length."""

    def __init__(self, items: Sequence[AudioItem], segment_seconds: float):
        self._items = list(items)
        counts = [max(1, int(item.duration_seconds // segment_seconds)) for item in items]
        self._owners = np.repeat(np.arange(len(items)), counts)  # segment -> item

    def __len__(self) -> int:
        return len(self._owners)

    def __getitem__(self, index: int) -> Recording:
        return open_item(self._items[self._owners[index]])

    def texts(self, max_seconds: float) -> list[str]:
        """The texts of all recordings of at most `max_seconds` that have one."""
        texts = []
        for item in self._items:
            text, _ = manifest.read_text(item.metadata)
            if text and item.duration_seconds <= max_seconds:
                texts.append(text)
        return texts

    def name(self, index: int) -> str:
        """The name of a segment's file in the log."""
        return item_name(self._items[self._owners[index]])


class RecordSource:
    """Random access to the records of shards; each counts once, because lengths are unknown."""

    def __init__(self, paths: Sequence[storage.Path]):
        self._shards = records.Shards(paths)

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> Recording:
        return _recording(*self._shards.read(index))

    def name(self, index: int) -> str:
        """The name of a record in the log."""
        return self._shards.name(index)


Source = FileSource | RecordSource


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sources, and weights in proportion to which they are drawn from."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.sources))


def open_item(item: AudioItem) -> Recording:
    """The recording of an item. A record is read from its shard.

    Raises:
      ValueError: The record cannot be read.
    """
    if item.record is not None:
        audio, metadata = records.shard(item.path).read(item.record)
        return _recording(audio, metadata)
    text, task = manifest.read_text(item.metadata)
    return Recording(item.path, item.domain, item.duration_seconds, text, task)


def item_name(item: AudioItem) -> str:
    """The name of an item in messages: "FILE" or "SHARD[NUMBER]"."""
    return str(item.path) if item.record is None else f"{item.path}[{item.record}]"


def _recording(audio: files.AudioBytes, metadata: dict) -> Recording:
    domain = str(metadata.get("domain", "audio"))
    duration = metadata.get("duration_s")
    if not isinstance(duration, (int, float)):
        duration = files.duration_seconds(audio)
    text, task = manifest.read_text(metadata)
    return Recording(audio, domain, float(duration), text, task)


def parse(text: str) -> list[tuple[str, float | None]]:
    """Splits SOURCE[:WEIGHT],... into sources and weights; a weight is a number after the colon.

    Raises:
      ValueError: A source is empty, a weight is not positive, or only some sources have weights.
    """
    sources = []
    for part in text.split(","):
        name = part.strip()
        weight = None
        head, colon, tail = name.rpartition(":")
        if colon and _is_float(tail):
            name = head
            weight = float(tail)
        if not name:
            raise ValueError(f"empty source in {text!r}; accepted: SOURCE[:WEIGHT],...")
        if weight is not None and not 0 < weight < float("inf"):
            raise ValueError(f"{part.strip()}: the weight must be positive, got {tail}")
        sources.append((name, weight))
    num_weights = sum(weight is not None for _, weight in sources)
    if num_weights not in (0, len(sources)):
        raise ValueError(f"give all sources a weight or none, got {text!r}")
    return sources


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def training_mixture(text: str, segment_seconds: float) -> Mixture:
    """The train splits of the sources in `text`.

    Args:
      text: SOURCE[:WEIGHT],...; without a weight, a source counts by its size.
      segment_seconds: Length of a segment.

    Raises:
      ValueError: A source does not exist, is broken, or has nothing to train on.
    """
    sources = []
    weights = []
    for name, weight in parse(text):
        shards, items = _locate_split(name, "train")
        source = RecordSource(shards) if shards else FileSource(items, segment_seconds)
        if not len(source):
            raise ValueError(f"{name}: no files of the split 'train'")
        sources.append(source)
        if weight is None:
            weight = float(len(source))
        weights.append(weight)
    return Mixture(tuple(sources), tuple(weights))


def evaluation_items(text: str, max_items: int) -> list[AudioItem]:
    """Up to `max_items` recordings, evenly spread over the test splits of the sources in `text`.

    Weights are ignored.
    """
    parts: list[Sequence[AudioItem] | storage.Path] = []
    for name, _ in parse(text):
        shards, items = _locate_split(name, "test")
        parts += [*shards, items]
    lengths = [len(_records_or_items(part)) for part in parts]
    ends = np.cumsum(lengths)
    total = sum(lengths)
    chosen = []
    for index in np.linspace(0, total - 1, min(max_items, total)).round().astype(int):
        number = int(np.searchsorted(ends, index, side="right"))
        part = parts[number]
        index_in_part = int(index - ends[number] + lengths[number])
        if isinstance(part, list):
            chosen.append(part[index_in_part])
        else:
            chosen.append(AudioItem(part, "test", "audio", 0.0, index_in_part))
    return chosen


def _records_or_items(
    part: Sequence[AudioItem] | storage.Path,
) -> Sequence[AudioItem] | records.Shards:
    return part if isinstance(part, list) else records.shard(part)


def _locate_split(name: str, split: str) -> tuple[list[storage.Path], list[AudioItem]]:
    """The shards, or else the items, of one split; see `locate`."""
    shards, items = locate(name)
    shards = [path for path in shards if shard_split(path) == split]
    items = [item for item in items if item.split == split]
    return shards, items


def locate(name: str) -> tuple[list[storage.Path], list[AudioItem]]:
    """The shards, or else the items, of a folder, manifest, shard or glob pattern.

    Raises:
      ValueError: There is nothing at `name`, or a manifest is broken.
    """
    path = storage.to_path(name)
    if path.is_dir():
        paths = sorted(path.glob(f"*{records.SUFFIX}"))
        if not paths:
            return [], manifest.find_items(path)
    elif path.suffix == records.SUFFIX or glob.has_magic(name) and not path.exists():
        paths = storage.find(name)
        if not paths:
            raise ValueError(f"{name}: no such files")
    else:
        return [], manifest.find_items(path)
    shards = [path for path in paths if path.suffix == records.SUFFIX]
    if shards:
        return shards, []
    items = []
    for path in paths:
        if path.suffix == ".jsonl":
            items += manifest.find_items(path)
    if items:
        return [], items
    audio = [path for path in paths if path.suffix or not path.is_dir()]
    top = audio[0].parents[-1] if audio else storage.to_path(name)
    return [], manifest.list_files(top, audio, name)


def shard_split(path: storage.Path) -> str:
    """The split of a shard: SPLIT of SPLIT-00000-of-00010.array_record, "train" of other names."""
    match = _SHARD_NAME.fullmatch(path.name)
    return match[1] if match else "train"
