"""Prepares audio for training: turns a folder or manifest into balanced ArrayRecord shards.

The list of recordings determines the shard of each recording, and a shard appears only when it is
complete. So an interrupted preparation can be resumed, and any number of processes or machines
(`run_beam`) can share the work.
"""

import collections
import dataclasses
import hashlib
import heapq
import io
import json
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from array_record.python.array_record_module import ArrayRecordWriter

from moss_tok import extras, storage
from moss_tok.audio import files, manifest, notes
from moss_tok.audio.manifest import AudioItem
from moss_tok.data import jobs, records
from moss_tok.data.jobs import Plan, Shard
from moss_tok.json_files import format_json, format_json_lines, read_json_lines

_PLAN = "prepare.json"
_PART = ".jsonl"  # suffix of a shard's part: a line per record and per rejected file
_SILENCE_DB = -60.0
# Subtypes with more than 16 bits; their records have 24 bits.
_DEEP_SUBTYPES = ("PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ALAC_20", "ALAC_24", "ALAC_32")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How recordings are prepared.

    Attributes:
      sample_rate: Hz to resample to; 0: keep the rate of each file.
      num_shards: Shards per split; 0: one per `shard_hours`.
      shard_hours: Audio per shard if num_shards is 0.
      min_seconds: Shorter recordings are rejected.
      max_seconds: Longer recordings without transcript or caption are cut into equal parts.
    """

    sample_rate: int = 0
    num_shards: int = 0
    shard_hours: float = 2.0
    min_seconds: float = 0.1
    max_seconds: float = 60.0

    def __post_init__(self):
        if self.sample_rate and not 1000 <= self.sample_rate <= 384000:
            raise ValueError(f"sample_rate must be 1000..384000 Hz, got {self.sample_rate}")
        if not 0 <= self.num_shards <= 99999:
            raise ValueError(f"num_shards must be 1..99999, got {self.num_shards}")
        jobs.check_shard_hours(self.shard_hours)
        if not 0 < self.max_seconds < math.inf:
            raise ValueError(f"max_seconds must be positive, got {self.max_seconds}")
        if not 0 <= self.min_seconds <= self.max_seconds:
            raise ValueError(
                f"min_seconds must be 0..max_seconds {self.max_seconds:g}, got {self.min_seconds}"
            )


@dataclasses.dataclass(frozen=True)
class Record:
    """One record: the bytes of a FLAC file, and the fields of its line in the manifest."""

    audio: bytes = dataclasses.field(repr=False)
    metadata: dict[str, Any]


def prepare_file(item: AudioItem, settings: Settings) -> list[Record]:
    """The records of one recording.

    A FLAC file that needs no change is stored byte for byte.

    Raises:
      ValueError: The file cannot be read, is too short or silent; the message begins with its name.
    """
    audio: Path | files.AudioBytes = item.path
    is_flac = item.path.suffix.lower() == ".flac"
    if is_flac:  # read once: the bytes checked are the bytes stored
        with storage.named_errors(item.path):
            audio = files.AudioBytes(item.path.read_bytes(), str(item.path))
    wav, rate = files.read_native(audio)
    seconds = wav.shape[-1] / rate
    if seconds < settings.min_seconds:
        raise ValueError(f"{item.path}: shorter than {settings.min_seconds:g} s")
    if files.level_db(wav) < _SILENCE_DB:
        raise ValueError(f"{item.path}: silent")
    name = record_name(item)
    metadata = item.metadata | {"domain": item.domain, "split": item.split}
    text, _ = manifest.read_text(item.metadata)
    is_cut = seconds > settings.max_seconds and not text
    is_resampled = settings.sample_rate not in (0, rate)
    subtype = files.subtype(audio)
    is_flac = is_flac and audio.data[:4] == b"fLaC"  # the name may be wrong
    if is_flac and not (is_cut or is_resampled):
        return [_record(audio.data, name, seconds, metadata)]
    if is_resampled:
        wav = files.resample(wav, rate, settings.sample_rate)
        rate = settings.sample_rate
    num_parts = math.ceil(seconds / settings.max_seconds) if is_cut else 1
    prepared = []
    for number, part in enumerate(np.array_split(wav, num_parts, axis=-1)):
        data = _flac(part, rate, is_deep=subtype in _DEEP_SUBTYPES)
        part_name = f"{name}_{number:04d}" if is_cut else name
        part_seconds = part.shape[-1] / rate
        prepared.append(_record(data, part_name, part_seconds, metadata))
    return prepared


def record_name(item: AudioItem) -> str:
    """The id of a recording's record; ids of parts begin with it."""
    name = item.metadata.get("id")
    return storage.printable(item.path.stem) if name is None else str(name)


def _record(audio: bytes, name: str, seconds: float, metadata: dict[str, Any]) -> Record:
    return Record(audio, metadata | {"id": name, "duration_s": round(seconds, 6)})


def _flac(wav: np.ndarray, rate: int, is_deep: bool) -> bytes:
    buffer = io.BytesIO()
    samples = np.clip(wav, -1, 1).T
    subtype = "PCM_24" if is_deep else "PCM_16"
    try:
        soundfile.write(buffer, samples, rate, format="FLAC", subtype=subtype)
    except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"FLAC cannot hold {wav.shape[0]} channels at {rate} Hz ({error})"
        ) from error
    return buffer.getvalue()


def make_shards(items: list[AudioItem], settings: Settings) -> list[Shard]:
    """Distributes the recordings of each split over shards of about the same length.

    The recordings are ordered by a hash of their names, so that a shard is a random sample. Each
    goes into the shard that is shortest so far.
    """
    items_of_split: dict[str, list[AudioItem]] = collections.defaultdict(list)
    for item in items:
        items_of_split[item.split].append(item)
    shards = []
    for split in sorted(items_of_split):
        split_items = sorted(items_of_split[split], key=_hash_name)
        num_shards = _count_shards(split_items, settings)
        for number, shard_items in enumerate(_balance(split_items, num_shards)):
            name = f"{split}-{number:05d}-of-{num_shards:05d}{records.SUFFIX}"
            shards.append(Shard(name, tuple(shard_items)))
    return shards


def _count_shards(items: list[AudioItem], settings: Settings) -> int:
    """Number of shards of a split; each has at least one recording."""
    num_shards = settings.num_shards
    if not num_shards:
        hours = sum(item.duration_seconds for item in items) / 3600
        num_shards = max(1, round(hours / settings.shard_hours))
    return min(num_shards, len(items))


def _balance(items: list[AudioItem], num_shards: int) -> list[list[AudioItem]]:
    """Puts each item in turn into the shard that is shortest so far."""
    shards: list[list[AudioItem]] = [[] for _ in range(num_shards)]
    shortest_first = [(0.0, number) for number in range(num_shards)]  # a heap of (seconds, shard)
    for item in items:
        seconds, number = shortest_first[0]
        shards[number].append(item)
        seconds += max(item.duration_seconds, 0.01)
        heapq.heapreplace(shortest_first, (seconds, number))
    return shards


def _hash_name(item: AudioItem) -> bytes:
    return hashlib.sha256(storage.name_bytes(item.path)).digest()


def write_shard(plan: Plan, shard: Shard, progress: Callable[[], Any] = lambda: None) -> None:
    """Writes one shard and its listing, unless both exist.

    The listing has a line with the size of the shard, then one per record (as in the manifest) and
    per rejected file. The shard is renamed last, so it is complete if it exists.
    """
    if plan.is_done(shard):
        for _ in shard.items:
            progress()
        return
    listing = plan.part_path(shard)
    with jobs.new_file(plan.folder / shard.name) as temporary:
        rows = _write_records(temporary, shard, plan.settings, progress)
        if not any("record" in row for row in rows):
            temporary.write_bytes(b"")  # an ArrayRecord file without records cannot be opened
        size = {jobs.SHARD_BYTES: temporary.stat().st_size}
        listing.parent.mkdir(exist_ok=True)
        files.write_text(listing, format_json_lines([size, *rows]))


def _write_records(
    path: Path,
    shard: Shard,
    settings: Settings,
    progress: Callable[[], Any],
) -> list[dict[str, Any]]:
    """Writes the records of a shard; returns the rows of its listing."""
    rows: list[dict[str, Any]] = []
    count = 0
    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        for item in shard.items:
            try:
                prepared = prepare_file(item, settings)
            except (ValueError, OSError) as error:
                rows.append({"rejected": str(item.path), "reason": _reason(error, item)})
                prepared = []
            for record in prepared:
                writer.write(records.pack(record.audio, record.metadata))
                rows.append({"path": shard.name, "record": count} | record.metadata)
                count += 1
            progress()
    finally:
        writer.close()
    return rows


def _reason(error: Exception, item: AudioItem) -> str:
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})"
    return str(error).removeprefix(f"{item.path}: ")


def make_plan(source: str | Path, destination: str | Path, settings: Settings) -> Plan:
    """Plans the work and creates the folder, or resumes a folder with the same plan.

    Raises:
      ValueError: The source does not exist, or the destination holds something else.
    """
    destination = storage.to_local_path(destination)
    items = manifest.find_items(source)
    if any(item.record is not None for item in items):
        raise ValueError(f"{source}: is prepared already, its lines are records of shards")
    for item in items:
        records.check_metadata(record_name(item), item.metadata)
    shards = make_shards(items, settings)
    plan = {"plan": _digest(shards, settings)}
    jobs.begin(destination, _PLAN, plan, "a preparation of other files or settings")
    return Plan(destination, settings, tuple(shards), _PART)


def _digest(shards: list[Shard], settings: Settings) -> str:
    """A hash of all that determines the content of the shards."""
    descriptions = []
    for shard in shards:
        rows = [(str(item.path), item.split, item.domain, item.metadata) for item in shard.items]
        descriptions.append([shard.name, rows])
    text = json.dumps([dataclasses.asdict(settings), descriptions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def finish(plan: Plan) -> dict[str, Any]:
    """Writes manifest.jsonl, rejected.jsonl and summary.json; returns the summary.

    Raises:
      ValueError: All recordings were rejected.
    """
    folder = plan.folder
    rows = []
    rejected = []
    empty_shards = []
    for shard in plan.shards:
        num_earlier = len(rows)
        for _, row in read_json_lines(plan.part_path(shard)):
            if "id" in row:
                rows.append(row)
            elif "rejected" in row:
                rejected.append(row)
        if len(rows) == num_earlier:
            empty_shards.append(shard)
    summary = {
        "hours": _hours_by_domain(rows),
        "records": len(rows),
        "shards": len(plan.shards) - len(empty_shards),
        "rejected": _count_reasons(rejected),
    }
    jobs.remove_abandoned(folder)
    files.write_text(folder / "manifest.jsonl", format_json_lines(rows))
    files.write_text(folder / "rejected.jsonl", format_json_lines(rejected))
    files.write_text(folder / "summary.json", format_json(summary))
    if not rows:
        raise ValueError(f"all {len(rejected)} files were rejected, see {folder}/rejected.jsonl")
    for shard in empty_shards:
        (folder / shard.name).unlink()
    return summary


def _hours_by_domain(rows: list[dict[str, Any]]) -> dict[str, float]:
    hours: dict[str, float] = collections.defaultdict(float)
    for row in rows:
        hours[row["domain"]] += row["duration_s"] / 3600
    return {domain: round(hours[domain], 4) for domain in sorted(hours)}


def _count_reasons(rejected: list[dict[str, Any]]) -> dict[str, int]:
    """How often files were rejected for each reason, without the details in parentheses."""
    counts = collections.Counter(row["reason"].split(" (")[0] for row in rejected)
    return dict(counts.most_common())


def run_local(plan: Plan, num_workers: int, progress: Callable[[], Any] = lambda: None) -> None:
    """Writes the shards in `num_workers` processes; calls `progress` after each recording."""
    if num_workers == 1:  # another process would have to import everything again
        for shard in plan.shards:
            write_shard(plan, shard, progress)
        return
    notes.share_with_workers()
    context = multiprocessing.get_context("spawn")
    num_done = context.Value("q", 0)
    num_reported = 0
    # Not multiprocessing.Pool, which waits for ever for a worker that was killed.
    with ProcessPoolExecutor(num_workers, context, _start_worker, (num_done,)) as pool:
        worker_plan = _without_shards(plan)
        pending = {pool.submit(_work, worker_plan, shard) for shard in plan.shards}
        try:
            while pending:
                # Before the counter is read, so that the last recordings are reported, too.
                done, pending = wait(pending, 0.1, FIRST_EXCEPTION)
                count = num_done.value
                for _ in range(count - num_reported):
                    progress()
                num_reported = count
                for future in done:
                    future.result()  # raises the error of a worker
        except BaseException:  # KeyboardInterrupt, too
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _without_shards(plan: Plan) -> Plan:
    """The plan for workers, which get their shards separately."""
    return dataclasses.replace(plan, folder=plan.folder.absolute(), shards=())


def _start_worker(num_done: Any) -> None:
    global _NUM_DONE
    _NUM_DONE = num_done


def _work(plan: Plan, shard: Shard) -> None:
    def progress():
        with _NUM_DONE.get_lock():
            _NUM_DONE.value += 1

    write_shard(plan, shard, progress)


def run_beam(plan: Plan, runner: str, flags: list[str]) -> None:
    """Writes the shards in an Apache Beam pipeline. All workers must share the folder of the plan.

    Args:
      plan: The plan of the job.
      runner: Name of a Beam runner.
      flags: Other flags of Beam.

    Raises:
      ValueError: Beam is not installed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ValueError(f"Beam is not installed: {extras.install('beam')}") from error
    options = PipelineOptions([f"--runner={runner}", *flags])
    worker_plan = _without_shards(plan)
    with beam.Pipeline(options=options) as pipeline:
        _ = (
            pipeline
            | "shards" >> beam.Create(plan.shards)
            | "spread" >> beam.Reshuffle()
            | "write" >> beam.Map(lambda shard: write_shard(worker_plan, shard))
        )
