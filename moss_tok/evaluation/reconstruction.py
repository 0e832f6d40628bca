"""Reconstructs data sets: references, reconstructions and codes of each file.

An interrupted run resumes.
"""

import glob
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moss_tok import storage
from moss_tok.audio import files
from moss_tok.codec import codes
from moss_tok.codec.config import CodecConfig
from moss_tok.codec.inference import (
    Codec,
    batch_rows,
    bucket_frames,
    decode_batch,
    encode_batch,
)
from moss_tok.evaluation import metrics
from moss_tok.evaluation.baselines import Baseline
from moss_tok.evaluation.datasets import Dataset
from moss_tok.json_files import read_json_object

_BATCH_SECONDS = 120.0  # of audio per batch, padding included, unless one recording is longer
_MAX_BATCH_SIZE = 64


def check_output(output: str) -> None:
    """Raises ValueError unless `output` is new, or empty, or a folder with results."""
    path = storage.to_local_path(output)
    if not output or (path.exists() and not path.is_dir()):
        raise ValueError(f"output must be a folder, got {output!r}")
    has_results = any(path.glob("*/*/manifest.json")) or any(path.glob("*/*/*/manifest.json"))
    if _has_files(path) and not has_results:
        raise ValueError(f"{path} is not empty, and has no results to resume")


def _has_files(folder: Path) -> bool:
    """Whether a folder has files; the temporary files of an interrupted run do not count."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith(files.INCOMPLETE):
            return True
    return False


def parse_numbers(text: str, maximum: int) -> list[int]:
    """Parses numbers of quantizers: "all", or numbers and ranges as in "1,2,4,8..16".

    Raises:
      ValueError: The text has another form, or a number is not 1..maximum.
    """
    if text == "all":
        return list(range(1, maximum + 1))
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("..")
        last = last or first
        decimal = first.isdecimal() and last.isdecimal()
        if not (decimal and 1 <= int(first) <= int(last) <= maximum):
            raise ValueError(
                f"num_quantizers must be all, or numbers and ranges of 1..{maximum} as in "
                f"1,2,4..8, got {text!r}"
            )
        numbers |= set(range(int(first), int(last) + 1))
    return sorted(numbers)


def reconstruct(
    codec: Codec,
    dataset: Dataset,
    numbers: Sequence[int],
    folder: Path,
    model: dict[str, Any],
) -> Iterator[str]:
    """Writes references, reconstructions and codes of a data set; existing files are kept.

    Args:
      codec: The codec.
      dataset: The data set.
      numbers: Numbers of quantizers to decode from.
      folder: OUTPUT/MODEL.
      model: The codec's entry in the manifests.

    Yields:
      The name of each finished file.

    Raises:
      ValueError: A recording cannot be read, or the folder has results of another codec or data
        set.
    """
    # All bitrates share the codes, so manifests of other bitrates must be of this run, too.
    for path in folder.glob(f"rvq*/{glob.escape(dataset.name)}/manifest.json"):
        suffix = path.parents[1].name.removeprefix("rvq")
        number = int(suffix) if suffix.isdecimal() else None
        _check_manifest(path, _describe(dataset, model, number))
    for number in numbers:
        _begin(_rate_folder(folder, number, dataset), _describe(dataset, model, number))
    (folder / "codes" / dataset.name).mkdir(parents=True, exist_ok=True)
    tasks = _list_tasks(dataset, numbers, folder)
    tasks.sort(key=lambda task: task.seconds)
    # Finished files stay in the batches: the rounding of a file depends on its batch.
    for batch in _batches(tasks, codec.config):
        if any(_is_incomplete(task, folder, dataset) for task in batch.tasks):
            _reconstruct_batch(codec, batch, folder, dataset)
        for task in batch.tasks:
            yield task.name


class _Task(NamedTuple):
    """A recording, its FLAC file's name, and the numbers of quantizers not yet decoded from."""

    seconds: float
    audio: Path
    name: str
    missing: list[int]


def _list_tasks(dataset: Dataset, numbers: Sequence[int], folder: Path) -> list[_Task]:
    tasks = []
    for (audio, name, _), seconds in zip(dataset.items, dataset.seconds, strict=True):
        missing = []
        for number in numbers:
            if not _is_written(_rate_folder(folder, number, dataset), name):
                missing.append(number)
        tasks.append(_Task(seconds, audio, name, missing))
    return tasks


def _is_incomplete(task: _Task, folder: Path, dataset: Dataset) -> bool:
    """Whether codes or reconstructions of a recording are missing."""
    return bool(task.missing) or not _code_file(folder, dataset, task.name).exists()


class _Batch(NamedTuple):
    """Recordings of similar length, the rows of the batch, and the frames of a row."""

    tasks: list[_Task]
    num_rows: int
    num_frames: int


def _batches(tasks: Sequence[_Task], config: CodecConfig) -> Iterator[_Batch]:
    """Batches in few shapes, because compiling takes long: two lengths per octave."""
    buckets: dict[int, list[_Task]] = {}
    for task in tasks:
        # Resampling rounds up; the subtraction undoes the rounding of the product.
        num_samples = math.ceil(task.seconds * config.sample_rate - 1e-6)
        task_frames = config.num_frames(num_samples)
        num_frames = bucket_frames(max(1, task_frames), per_octave=2)
        buckets.setdefault(num_frames, []).append(task)
    for num_frames, bucket in buckets.items():
        batch_size = int(_BATCH_SECONDS * config.frame_rate / num_frames)
        batch_size = max(1, min(_MAX_BATCH_SIZE, batch_size))
        while bucket:
            num_rows = batch_rows(len(bucket), batch_size)
            yield _Batch(bucket[:num_rows], num_rows, num_frames)
            bucket = bucket[num_rows:]


def reconstruct_by(
    baseline: Baseline,
    dataset: Dataset,
    folder: Path,
    sample_rate: int,
    num_channels: int,
) -> Iterator[str]:
    """Writes references and reconstructions by another codec; existing files are kept.

    Args:
      baseline: The other codec.
      dataset: The data set.
      folder: OUTPUT/NAME of the baseline.
      sample_rate: Hz of the written files.
      num_channels: Channels of the written files.

    Yields:
      The name of each finished file.

    Raises:
      ValueError: As `reconstruct`, or from the baseline.
    """
    model = {
        "adapter": "baseline",
        "name": baseline.name,
        "sample_rate": sample_rate,
        "channels": num_channels,
        "bps": baseline.bps,
    }
    if baseline.files is not None:
        model["sha256"] = _digest(baseline.files, dataset)
    rate_folder = folder / dataset.name
    _begin(rate_folder, _describe(dataset, model, None))
    for audio, name, _ in dataset.items:
        if not _is_written(rate_folder, name):
            wav = _read_reference(audio, sample_rate, num_channels)
            wav_hat = baseline.code(audio, wav, sample_rate)[:, : wav.shape[1]]
            padding = wav.shape[1] - wav_hat.shape[1]
            wav_hat = np.pad(wav_hat, ((0, 0), (0, padding)))
            _write_pair(rate_folder, name, wav, wav_hat, sample_rate)
        yield name


def _digest(reconstructions: Mapping[str, Sequence[Path]], dataset: Dataset) -> str:
    """The sha256 sum of the reconstructions of all recordings, in the order of the data set."""
    digest = hashlib.sha256()
    for audio, _, _ in dataset.items:
        (path,) = reconstructions[audio.stem]
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _begin(rate_folder: Path, description: dict[str, Any]) -> None:
    """Makes the folder of a system and data set; ValueError if it holds other results."""
    file = rate_folder / "manifest.json"
    _check_manifest(file, description)
    rate_folder.mkdir(parents=True, exist_ok=True)
    files.write_text(file, json.dumps(description, indent=2, sort_keys=True) + "\n")
    for kind in ("gt_audios", "syn_audios"):
        (rate_folder / kind).mkdir(exist_ok=True)


def _check_manifest(file: Path, description: dict[str, Any]) -> None:
    if file.exists() and read_json_object(file) != description:
        raise ValueError(f"{file.parent}: holds results of another codec or data set")


def _read_reference(audio: Path, sample_rate: int, num_channels: int) -> np.ndarray:
    wav, rate = files.read_native(audio)
    wav = metrics.resample(wav, rate, sample_rate)
    if 1 < num_channels < wav.shape[0]:  # the protocol takes the first two channels of surround
        return wav[:num_channels]
    return files.to_channels(wav, num_channels)


def _write_pair(
    rate_folder: Path,
    name: str,
    wav: np.ndarray,
    wav_hat: np.ndarray,
    sample_rate: int,
) -> None:
    files.write(rate_folder / "gt_audios" / name, wav, sample_rate)
    files.write(rate_folder / "syn_audios" / name, wav_hat, sample_rate)


def _reconstruct_batch(codec: Codec, batch: _Batch, folder: Path, dataset: Dataset) -> None:
    """Writes the codes of recordings, and their missing reconstructions."""
    config = codec.config
    wavs = []
    missing: set[int] = set()
    for task in batch.tasks:
        wavs.append(_read_reference(task.audio, config.sample_rate, config.num_channels))
        missing.update(task.missing)
    num_empty = batch.num_rows - len(wavs)
    empty = np.zeros((config.num_channels, 0), np.float32)
    arrays = encode_batch(codec, wavs + [empty] * num_empty, num_frames=batch.num_frames)
    for wav, array, task in zip(wavs, arrays, batch.tasks, strict=False):
        codes.write(_code_file(folder, dataset, task.name), array, wav.shape[1], codec)
    for number in sorted(missing):
        rate_folder = _rate_folder(folder, number, dataset)
        wavs_hat = decode_batch(codec, arrays, number, batch.num_frames)
        for wav, wav_hat, task in zip(wavs, wavs_hat, batch.tasks, strict=False):
            if number in task.missing:
                wav_hat = wav_hat[:, : wav.shape[1]]
                _write_pair(rate_folder, task.name, wav, wav_hat, config.sample_rate)


def read_codes(folder: Path, dataset: Dataset, name: str, codec: Codec) -> np.ndarray:
    """Reads the codes [Q, T] of a file from OUTPUT/MODEL/codes/DATASET.

    Args:
      folder: OUTPUT/MODEL.
      dataset: The data set.
      name: Name of the FLAC file.
      codec: The codec that made them.

    Raises:
      ValueError: The file of codes is missing or broken.
    """
    return codes.read(_code_file(folder, dataset, name), codec).codes


def _code_file(folder: Path, dataset: Dataset, name: str) -> Path:
    return folder / "codes" / dataset.name / Path(name).with_suffix(".npz").name


def _rate_folder(folder: Path, number: int, dataset: Dataset) -> Path:
    return folder / f"rvq{number}" / dataset.name


def _is_written(rate_folder: Path, name: str) -> bool:
    has_reference = (rate_folder / "gt_audios" / name).exists()
    return has_reference and (rate_folder / "syn_audios" / name).exists()


def _describe(dataset: Dataset, model: dict[str, Any], number: int | None) -> dict[str, Any]:
    """The contents of manifest.json."""
    digest = hashlib.sha256(dataset.path.read_bytes()).hexdigest()
    return {
        "schema_version": 1,
        "dataset": {
            "name": dataset.name,
            "jsonl_path": str(dataset.path),
            "jsonl_sha256": digest,
            "num_items": len(dataset.items),
            "output_names": dataset.output_names(),
        },
        "model": model,
        "nq": number,
    }
