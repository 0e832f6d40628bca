"""Whole data sets to shards of codes: planned, batched by length, resumed shard by shard.

The recordings are sorted by length and cut into shards; what a shard holds depends on the data set
and the settings alone, so a run that was killed goes on with the shards that are missing, and
several machines can share them. OUTPUT holds

  plan.json                 what is done, with what: another codec or data set does not go on
  codes-00000-of-00010.*    .array_record (see `moss_tok.data.codes`) or .jsonl (as the fine-tuning
                            of MOSS-TTS reads it: "audio_codes" are lists [T, Q])
  failures.jsonl            recordings that could not be read, and why
  summary.json              counts
"""

import collections
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moss_tok import sharding, storage
from moss_tok.audio import files, manifest
from moss_tok.audio.manifest import AudioItem
from moss_tok.codec import pretrained
from moss_tok.codec.inference import Codec, bucket_frames, encode, encode_one
from moss_tok.config import check_choice, read_json_object
from moss_tok.data import codes, records, sources

FORMATS = ("arrayrecord", "jsonl")
_LARGEST_BATCH = 64  # recordings per device


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is written, and how much at once.

    Attributes:
      num_quantizers: Codes per frame.
      format: One of FORMATS.
      shard_hours: Audio per shard.
      batch_seconds: Audio per batch and device, padding included.
      num_workers: Threads that read.
    """

    num_quantizers: int
    format: str = "arrayrecord"
    shard_hours: float = 5.0
    batch_seconds: float = 120.0
    num_workers: int = 4

    def __post_init__(self):
        check_choice("format", self.format, FORMATS)
        for name in ("shard_hours", "batch_seconds", "num_workers"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")


@dataclasses.dataclass
class Statistics:
    """What this process did.

    Attributes:
      audio_seconds: Encoded.
      padded_seconds: The same with padding.
      device_seconds: Time in which the devices had something to do.
      seconds: Time in all.
      shapes: How many batches of which (rows, frames).
    """

    audio_seconds: float = 0.0
    padded_seconds: float = 0.0
    device_seconds: float = 0.0
    seconds: float = 0.0
    shapes: collections.Counter = dataclasses.field(default_factory=collections.Counter)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All shards of a data set: (name of the file, its items with their ids)."""

    folder: Path
    settings: Settings
    shards: tuple[tuple[str, tuple[tuple[str, AudioItem], ...]], ...]

    @property
    def num_items(self) -> int:
        """Recordings in all."""
        return sum(len(items) for _, items in self.shards)


def find_items(source: str) -> list[tuple[str, AudioItem]]:
    """The recordings of a folder, manifest or ArrayRecord set, each with an id of its own.

    Raises:
      ValueError: Nothing there, or two recordings with one id.
    """
    if not source:
        raise ValueError("no source of recordings was given")
    path = storage.to_path(source)
    listing = path / "manifest.jsonl"
    if path.is_dir() and listing.is_file():
        found = manifest.find_items(listing)
    else:
        shards, items = sources.locate(source)
        found = items or [_record(p, n) for p in shards for n in range(len(records.shard(p)))]
    root = str(path if path.is_dir() else path.parent)
    named = [(_id(item, root), item) for item in found]
    names = collections.Counter(name for name, _ in named)
    # `prepare` names records by their files, which may have one name in several folders.
    several = {name for name, item in named if names[name] > 1 and item.record is not None}
    named = [(_place(item, root) if name in several else name, item) for name, item in named]
    names = collections.Counter(name for name, _ in named)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"{source}: {repeated[0]!r} is there more than once")
    return named


def _record(path: storage.Path, number: int) -> AudioItem:
    try:
        _, metadata = records.shard(path).read(number)
    except ValueError:  # is a failure when its turn comes
        metadata = {}
    duration = metadata.get("duration_s")
    duration = float(duration) if isinstance(duration, (int, float)) else 0.0
    domain = str(metadata.get("domain", "audio"))
    return AudioItem(path, "", domain, duration, number, metadata)


def _id(item: AudioItem, root: str) -> str:
    name = item.metadata.get("id")
    return name if isinstance(name, str) and name else _place(item, root)


def _place(item: AudioItem, root: str) -> str:
    """Where an item is, seen from the folder of the data set."""
    name = sources.item_name(item)
    return name.removeprefix(f"{root.rstrip('/')}/")


def plan(
    codec: Codec, items: Sequence[tuple[str, AudioItem]], folder: str | Path, settings: Settings
) -> Plan:
    """Cuts a data set into shards, and writes or checks plan.json.

    Raises:
      ValueError: `folder` holds codes of something else.
    """
    folder = storage.to_local_path(folder)
    ordered = sorted(items, key=lambda item: (item[1].duration_seconds, item[0]))
    seconds = np.cumsum([item.duration_seconds for _, item in ordered])
    numbers = (seconds / (3600 * settings.shard_hours)).astype(int)
    groups: dict[int, list[tuple[str, AudioItem]]] = collections.defaultdict(list)
    for number, item in zip(numbers, ordered, strict=True):
        groups[number].append(item)
    suffix = records.SUFFIX if settings.format == "arrayrecord" else ".jsonl"
    names = [f"codes-{n:05d}-of-{len(groups):05d}{suffix}" for n in range(len(groups))]
    content = [(name, item.duration_seconds) for name, item in ordered]
    written = {
        "codec": pretrained.fingerprint(codec),
        "data": hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16],
        "num_items": len(items),
        "num_quantizers": settings.num_quantizers,
        "format": settings.format,
        "shard_hours": settings.shard_hours,
        "dtype": codec.compute.dtype,
        "precision": codec.compute.precision,
        "sample_rate": codec.config.sample_rate,
        "num_channels": codec.config.num_channels,
        "hop_length": codec.config.hop_length,
        "codebook_size": codec.config.quantizer.codebook_size,
    }
    _check_plan(folder, written)
    shards = tuple((name, tuple(groups[n])) for name, n in zip(names, sorted(groups), strict=True))
    return Plan(folder, settings, shards)


def check_folder(folder: str | Path) -> None:
    """Raises ValueError unless codes can go there: a new or empty folder, or one with a plan."""
    path = storage.to_local_path(folder)
    if not folder or (path.exists() and not path.is_dir()):
        raise ValueError(f"output must be a folder, got {str(folder)!r}")
    names = {p.name for p in path.iterdir()} if path.exists() else set()
    # Another process may be about to write the plan.
    is_new = all(name.startswith(files.INCOMPLETE) for name in names)
    if "plan.json" not in names and not is_new:
        raise ValueError(f"{path} is not empty, and has no plan.json to go on with")


def check_share(shard_index: int, num_shards: int) -> None:
    """Raises ValueError unless `shard_index` is one of `num_shards` parts of the work."""
    if num_shards < 1:
        raise ValueError(f"num-shards must be at least 1, got {num_shards}")
    if not 0 <= shard_index < num_shards:
        raise ValueError(f"shard-index must be 0..{num_shards - 1}, got {shard_index}")


def _check_plan(folder: Path, written: dict[str, Any]) -> None:
    check_folder(folder)
    path = folder / "plan.json"
    if path.exists():
        found = read_json_object(path)
        differing = [k for k in written if found.get(k) != written[k]]
        if differing:
            listing = "; ".join(f"{k}: {found.get(k)}, now {written[k]}" for k in differing)
            raise ValueError(f"{folder} holds codes of another run: {listing}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(written, indent=2) + "\n")


def run(
    codec: Codec,
    plan: Plan,
    shard_index: int = 0,
    num_shards: int = 1,
    progress: Callable[[float], Any] = lambda seconds: None,
) -> Statistics:
    """Writes the shards that are missing, of every `num_shards`-th from `shard_index` on.

    Args:
      codec: With an encoder.
      plan: What is to be done.
      shard_index: 0..num_shards - 1.
      num_shards: Into how many parts the work is split.
      progress: Called with seconds of audio that are done.

    Raises:
      ValueError: shard_index out of range.
    """
    check_share(shard_index, num_shards)
    statistics, began = Statistics(), time.perf_counter()
    mesh = sharding.make_mesh("data:-1", jax.local_devices())
    encoder = _Encoder(codec, plan.settings, mesh, statistics)
    with ThreadPoolExecutor(plan.settings.num_workers) as pool:
        for name, items in plan.shards[shard_index::num_shards]:
            if not _is_done(plan.folder, name):
                _write_shard(encoder, pool, plan, name, items, progress)
            else:
                progress(sum(item.duration_seconds for _, item in items))
    statistics.seconds = time.perf_counter() - began
    return statistics


def _is_done(folder: Path, name: str) -> bool:
    return (folder / name).exists() and (folder / "parts" / f"{name}.json").exists()


def _write_shard(encoder, pool, plan, name, items, progress) -> None:
    found: dict[str, tuple[np.ndarray, int]] = {}
    failures = []
    for key, item, audio in _read_ahead(encoder, pool, items):
        try:
            wav = audio.result()
        except (ValueError, OSError) as error:
            failures.append({"id": key, "path": sources.item_name(item), "reason": str(error)})
        else:
            encoder.add(key, wav, found)
        progress(item.duration_seconds)
    encoder.flush(found)
    rows = [(key, item, *found[key]) for key, item in items if key in found]
    write = _WRITERS[plan.settings.format]
    temporary = plan.folder / f"{files.INCOMPLETE}{name}"
    try:
        write(temporary, rows)
        temporary.rename(plan.folder / name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    frames = sum(x.shape[1] for _, _, x, _ in rows)
    part = {"num_items": len(rows), "num_frames": frames, "failures": failures}
    (plan.folder / "parts").mkdir(exist_ok=True)
    files.write_text(plan.folder / "parts" / f"{name}.json", json.dumps(part) + "\n")


def _read_ahead(
    encoder: "_Encoder", pool: ThreadPoolExecutor, items: Sequence[tuple[str, AudioItem]]
) -> Iterator[tuple[str, AudioItem, Future]]:
    """Reads three batches ahead of what is encoded."""
    waiting: collections.deque[tuple[str, AudioItem, Future]] = collections.deque()
    ahead = 0.0
    for key, item in items:
        waiting.append((key, item, pool.submit(encoder.read, item)))
        ahead += item.duration_seconds
        while waiting and ahead > 3 * encoder.batch_seconds:
            ahead -= waiting[0][1].duration_seconds
            yield waiting.popleft()
    yield from waiting


def _read(item: AudioItem, sample_rate: int, num_channels: int) -> np.ndarray:
    """The audio of an item, as `moss-tok encode` reads it."""
    return files.read(sources.open_item(item).audio, sample_rate, num_channels)


class _Encoder:
    """Collects recordings of about the same length until they fill a batch.

    One batch is computed while the next is read and put together.
    """

    def __init__(self, codec, settings, mesh, statistics):
        self._config, self._mesh, self._settings = codec.config, mesh, settings
        self._statistics, self._rows = statistics, sharding.batch_sharding(mesh)
        params = jax.device_put(codec.params, sharding.replicated(mesh))
        self._codec = codec.replace(params=params)
        self._buckets: dict[int, list[tuple[str, np.ndarray]]] = collections.defaultdict(list)
        self._running: tuple[float, list[tuple[str, int]], Any, Future] | None = None
        self._watch = ThreadPoolExecutor(1)  # sees when a batch is done, not when it is asked for
        self.batch_seconds = settings.batch_seconds * mesh.size

    def read(self, item: AudioItem) -> np.ndarray:
        """The audio of an item as the codec wants it."""
        return _read(item, self._config.sample_rate, self._config.num_channels)

    def add(self, key: str, wav: np.ndarray, found: dict[str, Any]) -> None:
        """Puts a recording into a batch; full ones are computed."""
        size = bucket_frames(self._config.num_frames(wav.shape[1]))
        bucket = self._buckets[size]
        bucket.append((key, wav))
        if len(bucket) == self._batch_size(size):
            self._launch(size, self._buckets.pop(size), found)

    def flush(self, found: dict[str, Any]) -> None:
        """Computes what is left, in few shapes: a quarter of a batch, a sixteenth, ..."""
        for size, bucket in sorted(self._buckets.items()):
            rows = self._batch_size(size)
            while bucket:
                while rows > max(len(bucket), self._mesh.size):
                    rows = max(rows // 4, self._mesh.size)
                part, bucket = bucket[:rows], bucket[rows:]
                self._launch(size, part, found, rows)
        self._buckets.clear()
        self._collect(found)

    def _batch_size(self, size: int) -> int:
        seconds = size / self._config.frame_rate
        rows = int(self._settings.batch_seconds / seconds)
        return self._mesh.size * min(max(1, rows), _LARGEST_BATCH)

    def _launch(self, size, bucket, found, rows=0) -> None:
        c = self._config
        rows = rows or len(bucket)
        rows += -rows % self._mesh.size
        wav = np.zeros((rows, c.num_channels, size * c.hop_length), np.float32)
        lengths = np.zeros(rows, np.int32)
        for i, (_, x) in enumerate(bucket):
            wav[i, :, : x.shape[1]] = x
            lengths[i] = x.shape[1]
        wav, lengths = jax.device_put((wav, lengths), self._rows)
        self._collect(found)
        began = time.perf_counter()
        with jax.set_mesh(self._mesh):  # kernels ask for it
            out = encode(self._codec, wav, lengths, self._settings.num_quantizers).codes
        keys = [(k, x.shape[1]) for k, x in bucket]
        self._running = began, keys, out, self._watch.submit(_time_of, out)
        audio = sum(x.shape[1] for _, x in bucket) / c.sample_rate
        self._statistics.audio_seconds += audio
        self._statistics.shapes[rows, size] += 1
        self._statistics.padded_seconds += rows * size / c.frame_rate

    def _collect(self, found: dict[str, Any]) -> None:
        """Waits for the batch that is computed, if any."""
        if self._running is None:
            return
        began, keys, out, ended = self._running
        self._statistics.device_seconds += ended.result() - began
        out = np.asarray(out)
        for row, (key, num_samples) in zip(out, keys, strict=False):
            num_frames = self._config.num_frames(num_samples)
            found[key] = row[:, :num_frames].astype(np.int16), num_samples
        self._running = None


def _time_of(out: jax.Array) -> float:
    """When an array has been computed."""
    jax.block_until_ready(out)
    return time.perf_counter()


def _write_array_record(path: Path, rows: Sequence[tuple[str, AudioItem, np.ndarray, int]]) -> None:
    if not rows:  # nothing could be read; a shard without records cannot be opened
        path.touch()
        return
    with codes.Writer(path) as writer:
        for key, item, array, num_samples in rows:
            writer.write(codes.Item(key, array, num_samples, _metadata(item)))


def _write_jsonl(path: Path, rows: Sequence[tuple[str, AudioItem, np.ndarray, int]]) -> None:
    with path.open("w") as file:
        for key, item, array, num_samples in rows:
            ours = {"id": key, "audio": str(item.path), "num_samples": num_samples}
            fields = ours | _metadata(item) | ours
            if "text" not in fields and isinstance(fields.get("transcript"), str):
                fields["text"] = fields["transcript"]  # what the fine-tuning calls it
            fields["audio_codes"] = array.T.tolist()
            file.write(json.dumps(fields) + "\n")


def _metadata(item: AudioItem) -> dict[str, Any]:
    fields = {k: v for k, v in item.metadata.items() if k not in ("id", "audio_codes")}
    return {"domain": item.domain, "split": item.split} | fields


_WRITERS = {"arrayrecord": _write_array_record, "jsonl": _write_jsonl}


def finish(plan: Plan) -> dict[str, Any] | None:
    """Writes failures.jsonl and summary.json once all shards are there; the summary.

    Returns:
      None while other machines are at work.

    Raises:
      ValueError: Recordings are neither in the shards nor among the failures.
    """
    if not all(_is_done(plan.folder, name) for name, _ in plan.shards):
        return None
    parts = [read_json_object(plan.folder / "parts" / f"{n}.json") for n, _ in plan.shards]
    failures = [row for part in parts for row in part["failures"]]
    num_items = sum(part["num_items"] for part in parts)
    if num_items + len(failures) != plan.num_items:
        raise ValueError(
            f"{plan.folder}: {plan.num_items} recordings in, {num_items} out and {len(failures)} "
            "failures"
        )
    summary = {
        "num_items": num_items,
        "num_failures": len(failures),
        "num_frames": sum(part["num_frames"] for part in parts),
        "num_shards": len(plan.shards),
    }
    text = "".join(json.dumps(row) + "\n" for row in failures)
    files.write_text(plan.folder / "failures.jsonl", text)
    files.write_text(plan.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def wait(plan: Plan, poll_seconds: float = 5.0) -> dict[str, Any]:
    """`finish`, once the other processes of this run are done, too.

    jax.distributed gives the others five minutes from the end of the first, and ends all if one has
    died.
    """
    while (summary := finish(plan)) is None:
        time.sleep(poll_seconds)
    return summary


def verify(codec: Codec, plan: Plan, number: int, seed: int = 0) -> Iterator[tuple[str, int, int]]:
    """Encodes random items again, each alone: (id, codes that differ, codes in all)."""
    owners = {key: item for _, items in plan.shards for key, item in items}
    found, c = codes.read_codes(plan.folder), codec.config
    order = np.random.default_rng(seed).permutation(len(found))
    for index in order[:number]:
        item = found[int(index)]
        wav = _read(owners[item.id], c.sample_rate, c.num_channels)
        alone = encode_one(codec, wav, plan.settings.num_quantizers)
        yield item.id, int((alone != item.codes).sum()), item.codes.size
