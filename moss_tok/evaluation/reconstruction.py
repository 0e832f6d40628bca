"""Reconstructed data sets: references, reconstructions and codes of each file, resumable."""

import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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
    path = Path(output)
    if not output or (path.exists() and not path.is_dir()):
        raise ValueError(f"output must be a folder, got {output!r}")
    if not any(p.is_file() and not p.name.startswith(files.INCOMPLETE) for p in path.rglob("*")):
        return  # empty, or folders that an interrupted run had just made
    if not (any(path.glob("*/*/manifest.json")) or any(path.glob("*/*/*/manifest.json"))):
        raise ValueError(f"{path} is not empty, and has no results to resume")


def parse_numbers(text: str, maximum: int) -> list[int]:
    """Parses numbers of quantizers: "all", or numbers and ranges as in "1,2,4,8..16".

    Raises:
      ValueError: Another form, or a number that is not 1..maximum.
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
    codec: Codec, dataset: Dataset, numbers: Sequence[int], folder: Path, model: dict[str, Any]
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
        n = path.parents[1].name.removeprefix("rvq")
        number = int(n) if n.isdecimal() else None
        _check_manifest(path, _describe(dataset, model, number))
    for n in numbers:
        _begin(_rated_folder(folder, n, dataset), _describe(dataset, model, n))
    (folder / "codes" / dataset.name).mkdir(parents=True, exist_ok=True)
    works = _list_works(dataset, numbers, folder)
    works.sort(key=lambda work: work.seconds)
    # Finished files stay in the batches: the rounding of a file depends on its batch.
    for batch in _batches(works, codec.config):
        has_codes = all(_code_file(folder, dataset, work.name).exists() for work in batch.works)
        if not has_codes or any(work.missing for work in batch.works):
            _reconstruct_batch(codec, batch, folder, dataset)
        yield from (work.name for work in batch.works)


class _Work(NamedTuple):
    """A recording, its FLAC file's name, and the numbers of quantizers not yet decoded from."""

    seconds: float
    audio: Path
    name: str
    missing: list[int]


def _list_works(dataset: Dataset, numbers: Sequence[int], folder: Path) -> list[_Work]:
    works = []
    for (audio, name, _), seconds in zip(dataset.items, dataset.seconds, strict=True):
        missing = [n for n in numbers if not _is_written(_rated_folder(folder, n, dataset), name)]
        works.append(_Work(seconds, audio, name, missing))
    return works


class _Batch(NamedTuple):
    """Recordings of similar length, the rows of the batch, and the frames of a row."""

    works: list[_Work]
    rows: int
    num_frames: int


def _batches(works: Sequence[_Work], config: CodecConfig) -> Iterator[_Batch]:
    """Batches in few shapes, because compiling takes long: two lengths per octave."""
    buckets: dict[int, list[_Work]] = {}
    for work in works:
        frames = config.num_frames(round(work.seconds * config.sample_rate))
        buckets.setdefault(bucket_frames(max(1, frames), 2), []).append(work)
    for size, bucket in buckets.items():
        full = max(1, min(_MAX_BATCH_SIZE, int(_BATCH_SECONDS * config.frame_rate / size)))
        while bucket:
            rows = batch_rows(len(bucket), full)
            yield _Batch(bucket[:rows], rows, size)
            bucket = bucket[rows:]


def reconstruct_by(
    baseline: Baseline, dataset: Dataset, folder: Path, sample_rate: int, num_channels: int
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
    rated = folder / dataset.name
    _begin(rated, _describe(dataset, model, None))
    for audio, name, _ in dataset.items:
        if not _is_written(rated, name):
            wav = _read_reference(audio, sample_rate, num_channels)
            wav_hat = baseline.code(audio, wav, sample_rate)[:, : wav.shape[1]]
            wav_hat = np.pad(wav_hat, ((0, 0), (0, wav.shape[1] - wav_hat.shape[1])))
            _write_pair(rated, name, wav, wav_hat, sample_rate)
        yield name


def _begin(rated: Path, description: dict[str, Any]) -> None:
    """Makes the folder of a system and data set; ValueError if it holds other results."""
    file = rated / "manifest.json"
    _check_manifest(file, description)
    rated.mkdir(parents=True, exist_ok=True)
    files.write_text(file, json.dumps(description, indent=2, sort_keys=True) + "\n")
    for kind in ("gt_audios", "syn_audios"):
        (rated / kind).mkdir(exist_ok=True)


def _check_manifest(file: Path, description: dict[str, Any]) -> None:
    if file.exists() and read_json_object(file) != description:
        raise ValueError(f"{file.parent}: holds results of another codec or data set")


def _read_reference(audio: Path, sample_rate: int, num_channels: int) -> np.ndarray:
    wav, rate = files.read_native(audio)
    wav = metrics.resample(wav, rate, sample_rate)
    if 1 < num_channels < wav.shape[0]:  # the protocol takes the first two channels of surround
        return wav[:num_channels]
    return files.to_channels(wav, num_channels)


def _write_pair(rated: Path, name: str, wav: np.ndarray, wav_hat: np.ndarray, rate: int) -> None:
    files.write(rated / "gt_audios" / name, wav, rate)
    files.write(rated / "syn_audios" / name, wav_hat, rate)


def _reconstruct_batch(codec: Codec, batch: _Batch, folder: Path, dataset: Dataset) -> None:
    """Writes the codes of recordings, and their missing reconstructions."""
    config = codec.config
    wavs = []
    for work in batch.works:
        wavs.append(_read_reference(work.audio, config.sample_rate, config.num_channels))
    empty = [np.zeros((config.num_channels, 0), np.float32)] * (batch.rows - len(wavs))
    arrays = encode_batch(codec, [*wavs, *empty], num_frames=batch.num_frames)
    for wav, array, work in zip(wavs, arrays, batch.works, strict=False):
        codes.write(_code_file(folder, dataset, work.name), array, wav.shape[1], codec)
    for n in sorted({n for work in batch.works for n in work.missing}):
        rated = _rated_folder(folder, n, dataset)
        decoded = decode_batch(codec, arrays, n, batch.num_frames)
        for wav, wav_hat, work in zip(wavs, decoded, batch.works, strict=False):
            if n in work.missing:
                wav_hat = wav_hat[:, : wav.shape[1]]
                _write_pair(rated, work.name, wav, wav_hat, config.sample_rate)


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


def _rated_folder(folder: Path, number: int, dataset: Dataset) -> Path:
    return folder / f"rvq{number}" / dataset.name


def _is_written(rated: Path, name: str) -> bool:
    return all((rated / kind / name).exists() for kind in ("gt_audios", "syn_audios"))


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
