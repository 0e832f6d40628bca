"""What training draws from: files and ArrayRecord shards, several of them mixed by weights."""

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
      text: Its transcript or caption; empty where unknown.
      task: The kind of text, one of TASKS.
    """

    audio: storage.Path | files.AudioBytes
    domain: str
    duration_seconds: float
    text: str = ""
    task: str = TASKS[0]


class FileSource:
    """Random access to segments: an item counts once per whole segment of its length."""

    def __init__(self, items: Sequence[AudioItem], segment_seconds: float):
        counts = [max(1, int(item.duration_seconds // segment_seconds)) for item in items]
        self._items = list(items)
        self._owners = np.repeat(np.arange(len(items)), counts)

    def __len__(self) -> int:
        return len(self._owners)

    def __getitem__(self, index: int) -> Recording:
        return open_item(self._items[self._owners[index]])

    def texts(self, seconds: float) -> list[str]:
        """Those of recordings that are no longer than that."""
        items = (item for item in self._items if item.duration_seconds <= seconds)
        return [text for item in items if (text := manifest.read_text(item.metadata)[0])]

    def name(self, index: int) -> str:
        """The name of a segment's file in the log."""
        return item_name(self._items[self._owners[index]])


class RecordSource:
    """Random access to the records of shards; each counts once, as their lengths are unknown."""

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
    """Sources and the share of each in what is drawn."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.sources))


def open_item(item: AudioItem) -> Recording:
    """The recording of an item; a record's audio is read. Raises ValueError where that fails."""
    if item.record is None:
        text = manifest.read_text(item.metadata)
        return Recording(item.path, item.domain, item.duration_seconds, *text)
    return _recording(*records.shard(item.path).read(item.record))


def item_name(item: AudioItem) -> str:
    """What messages call an item."""
    return str(item.path) if item.record is None else f"{item.path}[{item.record}]"


def _recording(audio: files.AudioBytes, metadata: dict) -> Recording:
    duration = metadata.get("duration_s")
    if not isinstance(duration, (int, float)):
        duration = files.duration_seconds(audio)
    return Recording(audio, str(metadata.get("domain", "audio")), float(duration),
                     *manifest.read_text(metadata))  # fmt: skip


def parse(text: str) -> list[tuple[str, float | None]]:
    """Splits SOURCE[:WEIGHT],... into sources and weights; a weight is a number after the colon.

    Raises:
      ValueError: An empty source, a weight that is not positive, or weights for some only.
    """
    found = []
    for part in text.split(","):
        name, weight = part.strip(), None
        head, colon, tail = name.rpartition(":")
        if colon and _is_float(tail):
            name, weight = head, float(tail)
        if not name:
            raise ValueError(f"empty source in {text!r}; accepted: SOURCE[:WEIGHT],...")
        if weight is not None and not 0 < weight < float("inf"):
            raise ValueError(f"{part.strip()}: the weight must be positive, got {tail}")
        found.append((name, weight))
    if len({weight is None for _, weight in found}) > 1:
        raise ValueError(f"give all sources a weight or none, got {text!r}")
    return found


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def training_mixture(text: str, segment_seconds: float) -> Mixture:
    """The train splits of the sources in `text`; without weights each counts by its size.

    Raises:
      ValueError: A source that does not exist, is broken, or has nothing to train on.
    """
    sources, weights = [], []
    for name, weight in parse(text):
        shards, items = _find(name, "train")
        source = RecordSource(shards) if shards else FileSource(items, segment_seconds)
        if not len(source):
            raise ValueError(f"{name}: no files of the split 'train'")
        sources.append(source)
        weights.append(float(len(source)) if weight is None else weight)
    return Mixture(tuple(sources), tuple(weights))


def evaluation_items(text: str, most: int) -> list[AudioItem]:
    """Up to `most` recordings, evenly spread, of the sources' test splits; weights are ignored."""
    parts: list[Sequence[AudioItem] | storage.Path] = []
    for name, _ in parse(text):
        shards, items = _find(name, "test")
        parts += [*shards, items]
    lengths = [len(records.shard(p)) if not isinstance(p, list) else len(p) for p in parts]
    ends, total = np.cumsum(lengths), sum(lengths)
    chosen = []
    for place in np.linspace(0, total - 1, min(most, total)).round().astype(int):
        n = int(np.searchsorted(ends, place, side="right"))
        part, number = parts[n], int(place - ends[n] + lengths[n])
        shard = not isinstance(part, list)
        chosen.append(AudioItem(part, "test", "audio", 0.0, number) if shard else part[number])
    return chosen


def _find(name: str, split: str) -> tuple[list[storage.Path], list[AudioItem]]:
    """`locate`, one split."""
    shards, items = locate(name)
    return [p for p in shards if _shard_split(p) == split], _of_split(items, split)


def locate(name: str) -> tuple[list[storage.Path], list[AudioItem]]:
    """The shards, or else the items, of a folder, manifest, shard or glob pattern.

    Raises:
      ValueError: Nothing there, or a broken manifest.
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
    if shards := [p for p in paths if p.suffix == records.SUFFIX]:
        return shards, []
    manifests = [p for p in paths if p.suffix == ".jsonl"]
    items = [item for p in manifests for item in manifest.find_items(p)]
    if items:
        return [], items
    paths = [p for p in paths if p.suffix or not p.is_dir()]
    return [], manifest.list_files(paths[0].parents[-1] if paths else path, paths, name)


def _of_split(items: list[AudioItem], split: str) -> list[AudioItem]:
    return [item for item in items if item.split == split]


def _shard_split(path: storage.Path) -> str:
    """Shards are called SPLIT-00000-of-00010.array_record; by any other name they are "train"."""
    match = _SHARD_NAME.fullmatch(path.name)
    return match[1] if match else "train"
