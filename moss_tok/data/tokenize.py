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
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moss_tok import sharding, storage
from moss_tok.audio import files, manifest
from moss_tok.audio.manifest import AudioItem
from moss_tok.codec import inference, pretrained
from moss_tok.codec.inference import Codec
from moss_tok.data import codes, jobs, records, sources
from moss_tok.data.batches import BatchEncoder, CodesById, Statistics
from moss_tok.data.code_shards import WRITERS, Row, metadata_of
from moss_tok.data.config import PLAN
from moss_tok.data.jobs import Plan, Shard
from moss_tok.data.reading import Errors, Items, Reader, read_item
from moss_tok.errors import check_choice, is_number
from moss_tok.json_files import format_json, format_json_lines, read_json_object

_PART = ".json"  # suffix of a shard's part


@dataclasses.dataclass(frozen=True)
class Settings:
    """The format of the output, and the sizes of shards and batches.

    Attributes:
      num_quantizers: Codes per frame.
      format: "arrayrecord" or "jsonl".
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
        check_choice("format", self.format, tuple(WRITERS))
        for name in ("batch_seconds", "num_workers"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        jobs.check_shard_hours(self.shard_hours)


def find_items(source: str) -> list[tuple[str, AudioItem]]:
    """The recordings of a folder, manifest or ArrayRecord set, each with a unique id.

    Raises:
      ValueError: There are no recordings, or two have the same id.
    """
    if not source:
        raise ValueError("no source of recordings was given")
    path = storage.to_path(source)
    folder = path if path.is_dir() else path.parent
    root = str(folder)
    items = _list_items(source, path)
    ids = _unique_ids(items, root)
    for item_id, count in collections.Counter(ids).items():
        if count > 1:
            raise ValueError(f"{source}: {item_id!r} is there more than once")
    return list(zip(ids, items, strict=True))


def _list_items(source: str, path: storage.Path) -> list[AudioItem]:
    listing = path / "manifest.jsonl"
    if path.is_dir() and listing.is_file():
        return manifest.find_items(listing)
    shards, items = sources.locate(source)
    if items:
        return items
    items = []
    for shard in shards:
        for number in range(len(records.shard(shard))):
            items.append(_record(shard, number))
    return items


def _record(path: storage.Path, number: int) -> AudioItem:
    metadata = {}
    try:
        audio, metadata = records.shard(path).read(number)
        duration = metadata.get("duration_s")
        if not is_number(duration):
            duration = files.duration_seconds(audio)
    except ValueError:  # reported as a failure later, when it is encoded
        duration = 0.0
    domain = str(metadata.get("domain", "audio"))
    return AudioItem(
        path=path,
        split=sources.shard_split(path),
        domain=domain,
        duration_seconds=float(duration),
        record=number,
        metadata=metadata,
    )


def _unique_ids(items: Sequence[AudioItem], root: str) -> list[str]:
    """The ids that the items' metadata gives; paths for items without one.

    `prepare` takes the ids of records from file names, which may occur in several folders. Records
    that share an id get their paths instead.
    """
    ids = [_id(item, root) for item in items]
    counts = collections.Counter(ids)
    shared_by_records = set()
    for item_id, item in zip(ids, items, strict=True):
        if counts[item_id] > 1 and item.record is not None:
            shared_by_records.add(item_id)
    for index, item in enumerate(items):
        if ids[index] in shared_by_records:
            ids[index] = _relative_name(item, root)
    return ids


def _id(item: AudioItem, root: str) -> str:
    item_id = item.metadata.get("id")
    if isinstance(item_id, str) and item_id:
        return item_id
    return _relative_name(item, root)


def _relative_name(item: AudioItem, root: str) -> str:
    """The path of an item relative to `root`, the folder of the data set."""
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
    for item_id, item in items:
        records.check_metadata(item_id, item.metadata)
    folder = storage.to_local_path(folder)
    by_length = sorted(items, key=lambda pair: (pair[1].duration_seconds, pair[0]))
    content = []
    for item_id, item in by_length:
        content.append((item_id, item.duration_seconds, metadata_of(item)))
    fields = {
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
    shards = _divide(by_length, settings)
    jobs.begin(folder, PLAN, fields, "codes of another run")
    return Plan(folder, settings, shards, _PART)


def _divide(by_length: Items, settings: Settings) -> tuple[Shard, ...]:
    """Divides recordings, shortest first, into shards of about `shard_hours` of audio."""
    groups: dict[int, list[tuple[str, AudioItem]]] = collections.defaultdict(list)
    seconds = 0.0
    for item_id, item in by_length:
        seconds += item.duration_seconds
        group = int(seconds / (3600 * settings.shard_hours))
        groups[group].append((item_id, item))
    suffix = records.SUFFIX if settings.format == "arrayrecord" else ".jsonl"
    shards = []
    for number, group in enumerate(sorted(groups)):
        name = f"codes-{number:05d}-of-{len(groups):05d}{suffix}"
        shards.append(Shard(name, tuple(groups[group])))
    return tuple(shards)


def check_share(shard_index: int, num_shards: int) -> None:
    """Raises ValueError unless `shard_index` is one of `num_shards` parts of the work."""
    if num_shards < 1:
        raise ValueError(f"num-shards must be at least 1, got {num_shards}")
    if not 0 <= shard_index < num_shards:
        raise ValueError(f"shard-index must be 0..{num_shards - 1}, got {shard_index}")


def check_shared(folder: str | Path) -> None:
    """Raises ValueError unless all processes of jax.distributed see the same `folder`.

    Otherwise each would wait for the shards of the others for ever.
    """
    if jax.process_count() == 1:
        return
    path = storage.to_local_path(folder)
    probe = path / f"{files.INCOMPLETE}shared"
    is_new = not path.exists()
    if sharding.is_main_process():
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
    sharding.barrier("output is there")
    is_shared = sharding.all_agree(probe.exists())
    sharding.barrier("output was seen")
    if sharding.is_main_process():
        probe.unlink(missing_ok=True)
        if is_new and not is_shared:
            path.rmdir()
    if not is_shared:
        raise ValueError(f"output {folder}: must be a folder that all processes share")


def _short_durations(shards: Sequence[Shard]) -> list[float]:
    """Seconds of the recordings that are encoded in batches, not as streams."""
    durations = []
    for shard in shards:
        for _, item in shard.items:
            if not inference.is_long(item.duration_seconds):
                durations.append(item.duration_seconds)
    return durations


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
    # From all shards, whichever are done here: a resumed job makes the same batches.
    encoder.expect(_short_durations(plan.shards))
    with ThreadPoolExecutor(settings.num_workers) as pool:
        reader = Reader(codec, pool, progress)
        for shard in plan.shards[shard_index::num_shards]:
            if plan.is_done(shard):
                progress(sum(item.duration_seconds for _, item in shard.items))
                continue
            encoded, errors = reader.encode(encoder, shard.items)
            _write_shard(plan, shard, encoded, errors)
    encoder.statistics.seconds = time.perf_counter() - began
    return encoder.statistics


def _write_shard(plan: Plan, shard: Shard, encoded: CodesById, errors: Errors) -> None:
    """Writes the codes of a shard, then its part, which `finish` reads."""
    rows = []
    failures = []
    ids = []
    num_frames = 0
    for item_id, item in shard.items:
        if item_id in encoded:
            array, num_samples = encoded[item_id]
            rows.append(Row(item_id, item, array, num_samples))
            ids.append(item_id)
            num_frames += array.shape[1]
        if item_id in errors:
            reason = str(errors[item_id])
            failures.append({"id": item_id, "path": sources.item_name(item), "reason": reason})
    ids += [row["id"] for row in failures]
    with jobs.new_file(plan.folder / shard.name) as path:
        WRITERS[plan.settings.format](path, rows)
        num_bytes = path.stat().st_size
    part = {
        jobs.SHARD_BYTES: num_bytes,
        "num_items": len(rows),
        "num_frames": num_frames,
        "ids": jobs.digest(ids),
        "failures": failures,
    }
    with jobs.new_file(plan.part_path(shard)) as path:
        path.write_text(json.dumps(part) + "\n")


def finish(plan: Plan) -> dict[str, Any] | None:
    """Writes failures.jsonl and summary.json when all shards exist.

    Returns:
      The summary; None if other machines have not written all of their shards yet.

    Raises:
      ValueError: The recordings of a shard are not those of the plan.
    """
    if not all(plan.is_done(shard) for shard in plan.shards):
        return None
    num_items = 0
    num_frames = 0
    failures = []
    for shard in plan.shards:
        part = read_json_object(plan.part_path(shard))
        _check_part(plan, shard, part)
        num_items += part["num_items"]
        num_frames += part["num_frames"]
        failures += part["failures"]
    jobs.remove_abandoned(plan.folder)
    summary = {
        "num_items": num_items,
        "num_failures": len(failures),
        "num_frames": num_frames,
        "num_shards": len(plan.shards),
    }
    files.write_text(plan.folder / "failures.jsonl", format_json_lines(failures))
    files.write_text(plan.folder / "summary.json", format_json(summary))
    return summary


def _check_part(plan: Plan, shard: Shard, part: dict[str, Any]) -> None:
    """Raises ValueError unless a shard has exactly the recordings of the plan."""
    if not {"num_items", "num_frames", "ids", "failures"} <= part.keys():
        path = plan.part_path(shard)
        raise ValueError(f"{path}: is damaged; delete it, then its shard is written again")
    failed_ids = [row["id"] for row in part["failures"]]
    not_encoded = set(failed_ids)
    encoded_ids = [item_id for item_id, _ in shard.items if item_id not in not_encoded]
    has_all = part["num_items"] == len(encoded_ids)
    if not has_all or part["ids"] != jobs.digest(encoded_ids + failed_ids):
        raise ValueError(
            f"{plan.folder / shard.name}: the plan has {len(shard.items)} recordings, the "
            f"shard {part['num_items']} and {len(failed_ids)} failures, or other recordings"
        )


def wait(plan: Plan, poll_seconds: float = 5.0) -> dict[str, Any]:
    """Waits until the other processes of this run have written their shards; calls `finish`.

    This process must not end earlier: five minutes after the first process ends, jax.distributed
    ends the others. It also ends all processes if one has died.
    """
    while True:
        summary = finish(plan)
        if summary is not None:
            return summary
        time.sleep(poll_seconds)


def verify(
    codec: Codec, plan: Plan, number: int, share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[str, int, int]]:
    """Encodes random items again, each without a batch, and compares the codes.

    Args:
      codec: The codec of the run.
      plan: The plan of a finished job.
      number: Items to encode again, in all processes together.
      share: (i, n): this process verifies the i-th of n parts of these items.

    Yields:
      (id, number of codes that differ, number of codes) of each item.
    """
    audio_items: dict[str, AudioItem] = {}
    for shard in plan.shards:
        audio_items.update(shard.items)
    source = codes.read_codes(plan.folder)
    config = codec.config
    order = np.random.default_rng(0).permutation(len(source))[:number]
    first, step = share
    for index in order[first::step]:
        item = source[int(index)]
        wav = read_item(audio_items[item.id], config.sample_rate, config.num_channels)
        encoded = inference.encode_one(codec, wav, plan.settings.num_quantizers)
        num_different = int((encoded != item.codes).sum())
        yield item.id, num_different, item.codes.size
