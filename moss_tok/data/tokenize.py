"""Encodes whole data sets into shards of codes, batched by length and resumable shard by shard.

The recordings are sorted by length and divided into shards. The contents of a shard depend on the
data set and the settings alone, so a run that was killed resumes with the missing shards, and
several machines can share the work. OUTPUT holds

  plan.json                 codec, data set and settings; a run with others is refused
  codes-00000-of-00010.*    .array_record (see `moss_tok.data.codes`) or .jsonl (as the fine-tuning
                            of MOSS-TTS reads it: "audio_codes" are lists [T, Q])
  failures.jsonl            recordings that could not be read, and why
  summary.json              counts
"""

import collections
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moss_tok import storage
from moss_tok.audio import files, manifest
from moss_tok.audio.manifest import AudioItem
from moss_tok.codec import inference, pretrained
from moss_tok.codec.inference import Codec
from moss_tok.data import codes, jobs, records, sources
from moss_tok.data.batches import BatchEncoder, Found, Statistics
from moss_tok.data.config import PLAN
from moss_tok.data.jobs import Plan, Shard
from moss_tok.errors import check_choice, is_number
from moss_tok.json_files import read_json_object

FORMATS = ("arrayrecord", "jsonl")
_MAX_AHEAD = 1000  # recordings read ahead; some may be longer than their metadata says
_PART = ".json"  # suffix of a shard's part


@dataclasses.dataclass(frozen=True)
class Settings:
    """The format of the output, and the sizes of shards and batches.

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


Items = Sequence[tuple[str, AudioItem]]  # recordings with their ids
Failed = dict[str, Exception]  # why recordings could not be read, by id


def find_items(source: str) -> list[tuple[str, AudioItem]]:
    """The recordings of a folder, manifest or ArrayRecord set, each with a unique id.

    Raises:
      ValueError: There are no recordings, or two have the same id.
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
    metadata, duration = {}, None
    try:
        audio, metadata = records.shard(path).read(number)
        duration = metadata.get("duration_s")
        if not is_number(duration):
            duration = files.duration_seconds(audio)
    except ValueError:  # reported as a failure later, when it is encoded
        duration = 0.0
    domain = str(metadata.get("domain", "audio"))
    return AudioItem(path, "", domain, float(duration), number, metadata)


def _id(item: AudioItem, root: str) -> str:
    name = item.metadata.get("id")
    return name if isinstance(name, str) and name else _place(item, root)


def _place(item: AudioItem, root: str) -> str:
    """The path of an item relative to the folder of the data set."""
    name = sources.item_name(item)
    return storage.printable(name.removeprefix(f"{root.rstrip('/')}/"))


def make_plan(codec: Codec, items: Items, folder: str | Path, settings: Settings) -> Plan:
    """Divides a data set into shards, and writes plan.json or compares with it.

    Returns:
      The plan; items of its shards are (id, AudioItem).

    Raises:
      ValueError: `folder` holds other codes, or an item has a name or metadata that cannot be
        stored.
    """
    for name, item in items:
        records.check_metadata(name, item.metadata)
    folder = storage.to_local_path(folder)
    ordered = sorted(items, key=lambda item: (item[1].duration_seconds, item[0]))
    seconds = np.cumsum([item.duration_seconds for _, item in ordered])
    numbers = (seconds / (3600 * settings.shard_hours)).astype(int)
    groups: dict[int, list[tuple[str, AudioItem]]] = collections.defaultdict(list)
    for number, item in zip(numbers, ordered, strict=True):
        groups[number].append(item)
    suffix = records.SUFFIX if settings.format == "arrayrecord" else ".jsonl"
    names = [f"codes-{n:05d}-of-{len(groups):05d}{suffix}" for n in range(len(groups))]
    content = ((name, item.duration_seconds, _metadata(item)) for name, item in ordered)
    written = {
        "codec": pretrained.fingerprint(codec),
        "data": jobs.digest(content),
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
    jobs.begin(folder, PLAN, written, "codes of another run")
    pairs = zip(names, sorted(groups), strict=True)
    shards = tuple(Shard(name, tuple(groups[n])) for name, n in pairs)
    return Plan(folder, settings, shards, _PART)


def check_share(shard_index: int, num_shards: int) -> None:
    """Raises ValueError unless `shard_index` is one of `num_shards` parts of the work."""
    if num_shards < 1:
        raise ValueError(f"num-shards must be at least 1, got {num_shards}")
    if not 0 <= shard_index < num_shards:
        raise ValueError(f"shard-index must be 0..{num_shards - 1}, got {shard_index}")


def run(
    codec: Codec,
    plan: Plan,
    shard_index: int = 0,
    num_shards: int = 1,
    progress: Callable[[float], Any] = lambda seconds: None,
) -> Statistics:
    """Writes every `num_shards`-th shard from `shard_index` on, except those that exist.

    Args:
      codec: A codec with an encoder.
      plan: The plan of the job.
      shard_index: Number of this part of the work, 0..num_shards - 1.
      num_shards: Number of parts of the work.
      progress: Called with the seconds of audio that were processed.

    Raises:
      ValueError: shard_index is out of range.
    """
    check_share(shard_index, num_shards)
    began = time.perf_counter()
    settings = plan.settings
    encoder = BatchEncoder(codec, settings.num_quantizers, settings.batch_seconds)
    with ThreadPoolExecutor(settings.num_workers) as pool:
        reader = _Reader(codec, pool, progress)
        for shard in plan.shards[shard_index::num_shards]:
            if plan.is_done(shard):
                progress(sum(item.duration_seconds for _, item in shard.items))
            else:
                _write_shard(plan, shard, *reader.encode(encoder, shard.items))
    encoder.statistics.seconds = time.perf_counter() - began
    return encoder.statistics


def _write_shard(plan: Plan, shard: Shard, found: Found, failed: Failed) -> None:
    """Writes the codes of a shard, then its part, which `finish` reads."""
    rows = []
    failures = []
    for key, item in shard.items:
        if key in found:
            rows.append((key, item, *found[key]))
        if key in failed:
            reason = str(failed[key])
            failures.append({"id": key, "path": sources.item_name(item), "reason": reason})
    with jobs.new_file(plan.folder / shard.name) as path:
        _WRITERS[plan.settings.format](path, rows)
    part = {
        "num_items": len(rows),
        "num_frames": sum(x.shape[1] for _, _, x, _ in rows),
        "ids": jobs.digest([key for key, *_ in rows] + [row["id"] for row in failures]),
        "failures": failures,
    }
    with jobs.new_file(plan.part_path(shard)) as path:
        path.write_text(json.dumps(part) + "\n")


def _read(item: AudioItem, sample_rate: int, num_channels: int) -> np.ndarray:
    """The audio of an item, as `moss-tok encode` reads it."""
    return files.read(sources.open_item(item).audio, sample_rate, num_channels)


class _Reader:
    """Reads the recordings of a shard ahead of the encoder."""

    def __init__(self, codec: Codec, pool: ThreadPoolExecutor, progress: Callable[[float], Any]):
        self._shape = codec.config.sample_rate, codec.config.num_channels
        self._pool, self._progress = pool, progress

    def encode(self, encoder: BatchEncoder, items: Items) -> tuple[Found, Failed]:
        """The codes of the recordings that can be read, and the errors of the others."""
        found: Found = {}
        failed: Failed = {}
        long = []
        durations = [item.duration_seconds for _, item in items]
        encoder.expect([length for length in durations if not inference.is_long(length)])
        for key, item, audio in self._read_ahead(3 * encoder.batch_seconds, items):
            try:
                wav = audio and audio.result()
            except (ValueError, OSError) as error:
                failed[key] = error
            else:
                if wav is None or inference.is_long(wav.shape[1] / self._shape[0]):
                    long.append((key, functools.partial(self._blocks, item)))
                    continue
                encoder.add(key, wav, found)
            self._progress(item.duration_seconds)
        encoder.flush(found)
        failed |= encoder.encode_long(long[::-1], self._pool, found, self._progress)
        return found, failed

    def _read_ahead(
        self, seconds: float, items: Items
    ) -> Iterator[tuple[str, AudioItem, Future | None]]:
        """Recordings, read up to `seconds` of audio ahead; None for the audio of long ones."""
        waiting: collections.deque[tuple[str, AudioItem, Future | None]] = collections.deque()
        ahead = 0.0
        for key, item in items:
            is_long = inference.is_long(item.duration_seconds)
            waiting.append(
                (key, item, None if is_long else self._pool.submit(_read, item, *self._shape))
            )
            ahead += 0 if is_long else item.duration_seconds
            while waiting and (ahead > seconds or len(waiting) > _MAX_AHEAD):
                _, first, audio = waiting[0]
                ahead -= first.duration_seconds if audio else 0
                yield waiting.popleft()
        yield from waiting

    def _blocks(self, item: AudioItem) -> Iterator[np.ndarray]:
        audio = sources.open_item(item).audio
        return files.read_blocks(audio, *self._shape, inference.CHUNK_SECONDS)


def _write_array_record(path: Path, rows: Sequence[tuple[str, AudioItem, np.ndarray, int]]) -> None:
    if not rows:  # an ArrayRecord file without records cannot be opened
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
    """Writes failures.jsonl and summary.json when all shards exist.

    Returns:
      The summary; None if other machines have not written all of their shards yet.

    Raises:
      ValueError: The recordings of a shard are not those of the plan.
    """
    if not all(plan.is_done(shard) for shard in plan.shards):
        return None
    parts = [read_json_object(plan.part_path(shard)) for shard in plan.shards]
    failures = [row for part in parts for row in part["failures"]]
    num_items = sum(part["num_items"] for part in parts)
    for part, shard in zip(parts, plan.shards, strict=True):
        missing = dict.fromkeys(row["id"] for row in part["failures"])
        done = [key for key, _ in shard.items if key not in missing]
        if part["num_items"] != len(done) or part["ids"] != jobs.digest([*done, *missing]):
            raise ValueError(
                f"{plan.folder / shard.name}: the plan has {len(shard.items)} recordings, the "
                f"shard {part['num_items']} and {len(missing)} failures, or other recordings"
            )
    jobs.remove_abandoned(plan.folder)
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
    """Waits until the other processes of this run have written their shards; calls `finish`.

    jax.distributed gives the others five minutes after the first process ends, and ends all of them
    if one has died.
    """
    while (summary := finish(plan)) is None:
        time.sleep(poll_seconds)
    return summary


def verify(
    codec: Codec, plan: Plan, number: int, share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[str, int, int]]:
    """Encodes random items again, each alone: yields (id, differing codes, total codes).

    `share` is (i, n): this process verifies the i-th of n parts of the items.
    """
    owners = {}
    for shard in plan.shards:
        owners.update(shard.items)
    source = codes.read_codes(plan.folder)
    c = codec.config
    order = np.random.default_rng(0).permutation(len(source))[:number]
    for index in order[share[0] :: share[1]]:
        item = source[int(index)]
        wav = _read(owners[item.id], c.sample_rate, c.num_channels)
        alone = inference.encode_one(codec, wav, plan.settings.num_quantizers)
        yield item.id, int((alone != item.codes).sum()), item.codes.size
