"""The published evaluation protocol: data sets through a codec at several bitrates, files, scores.

Writes what OpenMOSS/MOSS-Audio-Tokenizer-Eval writes, so that its summary reads ours, and its
metrics that need downloaded models can be run on our files:

  OUTPUT/MODEL/rvqN/results.json                    {DATASET: {metric: mean}, "_meta": {"bps": n}}
  OUTPUT/MODEL/rvqN/DATASET/manifest.json
  OUTPUT/MODEL/rvqN/DATASET/{gt_audios,syn_audios}/000000_STEM.flac

and beside it what a run goes on from, and what its report needs:

  OUTPUT/MODEL/rvqN/DATASET/scores.jsonl            a line per file
  OUTPUT/MODEL/codes/DATASET/000000_STEM.npz        the codes, as `moss-tok encode` writes them
"""

import csv
import dataclasses
import functools
import glob
import hashlib
import io
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moss_tok import storage
from moss_tok.audio import files, manifest
from moss_tok.audio.manifest import TASKS
from moss_tok.codec import codes
from moss_tok.codec.config import CodecConfig
from moss_tok.codec.inference import Codec, bucket_frames, decode_batch, encode_batch
from moss_tok.evaluation import metrics
from moss_tok.evaluation.baselines import Baseline
from moss_tok.json_files import read_json_lines, read_json_object

_BATCH_SECONDS = 120.0  # of audio at once, padding included, unless one recording is longer
_LARGEST_BATCH = 64
_LONGEST_STEM = 255 - len("000000_.flac")  # of the bytes that a name may have
_AUDIO_KEYS = ("audio_path", "audio_file", "audio", "wav", "path")
# Of a language model that listens to the codes, see `transcription`.
TEXT_METRICS = ("wer", "cer")
# The last two are of torch models: kept where the official toolkit has written them.
COLUMNS = (*metrics.METRICS, *TEXT_METRICS, "sim", "utmos")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A list of recordings to evaluate on.

    Attributes:
      name: Of its folder in the results.
      path: Its JSONL file.
      items: (path of the audio, name of the FLAC file it becomes, domain or "").
      texts: What is said in each, "" where unknown.
      seconds: Length of each by its header.
    """

    name: str
    path: Path
    items: tuple[tuple[Path, str, str], ...] = dataclasses.field(repr=False)
    texts: tuple[str, ...] = dataclasses.field(repr=False)
    seconds: tuple[float, ...] = dataclasses.field(repr=False)

    def output_names(self) -> list[str]:
        """Names of the files."""
        return [name for _, name, _ in self.items]


def read_dataset(path: str | Path) -> Dataset:
    """Reads a JSONL file, one object per line with a path relative to the file's folder.

    Raises:
      ValueError: No such file, a line that is blank or no object or has no path, audio that is
        missing, empty or none, no lines, or a file name that results.json has another use for.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stem.startswith("_") or path.stem == "bps":
        raise ValueError(f"{path}: the name of a data set must not begin with _, nor be bps")
    if storage.printable(path.stem) != path.stem:
        raise ValueError(f"{path}: the name of a data set must be UTF-8")
    items, texts, lengths = [], [], []
    for number, line in enumerate(manifest.show_reading(manifest.read_lines(path)), 1):
        try:
            fields, audio, seconds = _parse_line(line, path.parent)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", audio.stem[:_LONGEST_STEM]).strip("._") or "audio"
        domain = storage.printable(str(fields.get("domain") or ""))
        items.append((audio, f"{len(items):06d}_{stem}.flac", domain))
        text, task = manifest.read_text(fields)
        texts.append(text if task == TASKS[0] else "")
        lengths.append(seconds)
    if not items:
        raise ValueError(f"{path}: no lines")
    return Dataset(path.stem, path.absolute(), tuple(items), tuple(texts), tuple(lengths))


def _parse_line(line: str, folder: Path) -> tuple[dict[str, Any], Path, float]:
    """What a line says, its recording, and how long that is by its header."""
    if not line.strip():
        raise ValueError("a blank line")
    fields = manifest.parse_line(line)
    audio = next((fields[key] for key in _AUDIO_KEYS if fields.get(key)), None)
    if audio is None:
        raise ValueError(f"no path; it goes under one of {', '.join(_AUDIO_KEYS)}")
    audio = folder / os.path.expanduser(str(audio))  # Path's refuses a file called ~a.wav
    if not audio.is_file():
        raise ValueError(f"no such file: {audio}")
    if not (seconds := files.duration_seconds(audio)):
        raise ValueError(f"{audio}: empty audio")
    return fields, audio, seconds


def check_output(output: str) -> None:
    """Raises ValueError unless results can go there: a new or empty folder, or one with some."""
    path = Path(output)
    if not output or (path.exists() and not path.is_dir()):
        raise ValueError(f"output must be a folder, got {output!r}")
    if not any(p.is_file() and not p.name.startswith(files.INCOMPLETE) for p in path.rglob("*")):
        return  # nothing, or folders that a killed run had just made
    if not (any(path.glob("*/*/manifest.json")) or any(path.glob("*/*/*/manifest.json"))):
        raise ValueError(f"{path} is not empty, and has no results to go on with")


def parse_numbers(text: str, most: int) -> list[int]:
    """Numbers of quantizers: "all", or numbers and ranges, "1,2,4,8..16".

    Raises:
      ValueError: Something else, or a number beyond `most`.
    """
    if text == "all":
        return list(range(1, most + 1))
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("..")
        last = last or first
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= most):
            raise ValueError(
                f"num_quantizers must be all, or numbers and ranges of 1..{most} as in 1,2,4..8, "
                f"got {text!r}"
            )
        numbers |= set(range(int(first), int(last) + 1))
    return sorted(numbers)


def reconstruct(
    codec: Codec, dataset: Dataset, numbers: Sequence[int], folder: Path, model: dict[str, Any]
) -> Iterator[str]:
    """Writes references, reconstructions and codes of a data set; what is there is kept.

    Args:
      codec: The codec.
      dataset: The data set.
      numbers: Of quantizers.
      folder: OUTPUT/MODEL.
      model: What the manifests say of the codec.

    Yields:
      The name of each file that is done.

    Raises:
      ValueError: A recording that cannot be read, or results of another codec or data set.
    """
    for path in folder.glob(f"rvq*/{glob.escape(dataset.name)}/manifest.json"):
        n = path.parents[1].name.removeprefix("rvq")  # all share the codes, and must be of one run
        _check_manifest(path, _describe(dataset, model, int(n) if n.isdecimal() else None))
    for n in numbers:
        _begin(_folder(folder, n, dataset), _describe(dataset, model, n))
    (folder / "codes" / dataset.name).mkdir(parents=True, exist_ok=True)
    works = []
    for (audio, name, _), seconds in zip(dataset.items, dataset.seconds, strict=True):
        missing = [n for n in numbers if not _is_written(_folder(folder, n, dataset), name)]
        works.append(_Work(seconds, audio, name, missing))
    # The same batches whatever is there: rounding of a file depends on them.
    for batch in _batches(sorted(works, key=lambda work: work.seconds), codec.config):
        has_codes = all(_code_file(folder, dataset, work.name).exists() for work in batch)
        if not has_codes or any(work.missing for work in batch):
            _reconstruct_batch(codec, batch, folder, dataset)
        yield from (work.name for work in batch)


class _Work(NamedTuple):
    """A recording, what it becomes, and the numbers of quantizers it has not been decoded from."""

    seconds: float
    audio: Path
    name: str
    missing: list[int]


def _batches(works: Sequence[_Work], config: CodecConfig) -> Iterator[list[_Work]]:
    """Works on recordings of about one length; 1, 2, 4, ... at once."""
    buckets: dict[int, list[_Work]] = {}
    for work in works:
        frames = config.num_frames(round(work.seconds * config.sample_rate))
        buckets.setdefault(bucket_frames(max(1, frames)), []).append(work)
    for size, bucket in buckets.items():
        rows = max(1, min(_LARGEST_BATCH, int(_BATCH_SECONDS * config.frame_rate / size)))
        while bucket:
            rows = 2 ** (min(rows, len(bucket)).bit_length() - 1)
            yield bucket[:rows]
            bucket = bucket[rows:]


def reconstruct_by(
    baseline: Baseline, dataset: Dataset, folder: Path, sample_rate: int, num_channels: int
) -> Iterator[str]:
    """`reconstruct` by another codec, into OUTPUT/NAME of the baseline, at one rate of its own."""
    model = {"adapter": "baseline", "name": baseline.name, "sample_rate": sample_rate,
             "channels": num_channels, "bps": baseline.bps}  # fmt: skip
    rated = folder / dataset.name
    _begin(rated, _describe(dataset, model, None))
    for audio, name, _ in dataset.items:
        if not _is_written(rated, name):
            wav = _reference(audio, sample_rate, num_channels)
            wav_hat = baseline.code(audio, wav, sample_rate)[:, : wav.shape[1]]
            wav_hat = np.pad(wav_hat, ((0, 0), (0, wav.shape[1] - wav_hat.shape[1])))
            _write_pair(rated, name, wav, wav_hat, sample_rate)
        yield name


def _begin(rated: Path, described: dict[str, Any]) -> None:
    """Makes the folder of a system and a data set, or checks that it is theirs."""
    file = rated / "manifest.json"
    _check_manifest(file, described)
    rated.mkdir(parents=True, exist_ok=True)
    files.write_text(file, json.dumps(described, indent=2, sort_keys=True) + "\n")
    for kind in ("gt_audios", "syn_audios"):
        (rated / kind).mkdir(exist_ok=True)


def _check_manifest(file: Path, described: dict[str, Any]) -> None:
    if file.exists() and read_json_object(file) != described:
        raise ValueError(f"{file.parent}: holds results of another codec or data set")


def _reference(audio: Path, sample_rate: int, num_channels: int) -> np.ndarray:
    wav, rate = files.read_native(audio)
    wav = metrics.resample(wav, rate, sample_rate)
    if 1 < num_channels < wav.shape[0]:  # of surround sound the protocol takes the first two
        return wav[:num_channels]
    return files.to_channels(wav, num_channels)


def _write_pair(rated: Path, name: str, wav: np.ndarray, wav_hat: np.ndarray, rate: int) -> None:
    files.write(rated / "gt_audios" / name, wav, rate)
    files.write(rated / "syn_audios" / name, wav_hat, rate)


def _reconstruct_batch(
    codec: Codec, works: Sequence[_Work], folder: Path, dataset: Dataset
) -> None:
    """Writes the codes of recordings, and what the first n of them give, for n that are missing."""
    c = codec.config
    wavs = [_reference(work.audio, c.sample_rate, c.num_channels) for work in works]
    found = encode_batch(codec, wavs)
    for wav, array, work in zip(wavs, found, works, strict=True):
        codes.write(_code_file(folder, dataset, work.name), array, wav.shape[1], c)
    for n in sorted({n for work in works for n in work.missing}):
        rated = _folder(folder, n, dataset)
        decoded = decode_batch(codec, found, n)
        for wav, wav_hat, work in zip(wavs, decoded, works, strict=True):
            if n in work.missing:
                _write_pair(rated, work.name, wav, wav_hat[:, : wav.shape[1]], c.sample_rate)


def _code_file(folder: Path, dataset: Dataset, name: str) -> Path:
    return folder / "codes" / dataset.name / Path(name).with_suffix(".npz").name


def _folder(folder: Path, number: int, dataset: Dataset) -> Path:
    return folder / f"rvq{number}" / dataset.name


def _is_written(folder: Path, name: str) -> bool:
    return all((folder / kind / name).exists() for kind in ("gt_audios", "syn_audios"))


def _describe(dataset: Dataset, model: dict[str, Any], number: int | None) -> dict[str, Any]:
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


def score(
    folder: Path,
    dataset: Dataset,
    names: Sequence[str],
    num_workers: int,
    progress: Callable[[], Any] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Scores the files of OUTPUT/MODEL/rvqN/DATASET; those of scores.jsonl are not scored again.

    Args:
      folder: That folder.
      dataset: The data set.
      names: Of metrics.
      num_workers: Processes.
      progress: Called for each file.

    Returns:
      File -> metric -> value, and "_errors": metric -> why, where it is not defined.
    """
    listing = folder / "scores.jsonl"
    rows = _read_scores(listing)
    wanted = {}
    for name in dataset.output_names():
        known = rows.get(name, {})
        left = [m for m in names if m not in known and m not in known.get("_errors", {})]
        if left:
            wanted[name] = left
        else:
            progress()
    if not wanted:
        return {name: rows.get(name, {"_errors": {}}) for name in dataset.output_names()}
    # Again, without a line that a killed run has cut.
    kept = "".join(json.dumps({"name": name} | row) + "\n" for name, row in rows.items())
    files.write_text(listing, kept)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool, listing.open("a") as file:
        work = pool.map(functools.partial(_score, folder), wanted, wanted.values())
        for name, (values, errors) in zip(wanted, work, strict=True):
            row = rows.setdefault(name, {})
            row |= values | {"_errors": row.get("_errors", {}) | errors}
            file.write(json.dumps({"name": name} | values | {"_errors": errors}) + "\n")
            file.flush()
            progress()
    return {name: rows[name] for name in dataset.output_names()}


def _read_scores(path: Path) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for row in (r for r in read_json_lines(path) if {"name", "_errors"} <= r.keys()):
        known = rows.setdefault(row.pop("name"), {})
        errors = known.get("_errors", {}) | row.pop("_errors")
        known |= row | {"_errors": errors}
    return rows


def _score(folder: Path, name: str, names: Sequence[str]) -> tuple[dict[str, float], Any]:
    pair = [files.read_native(folder / kind / name) for kind in ("gt_audios", "syn_audios")]
    (reference, rate), (synthesis, _) = pair
    return metrics.compute_each(reference, synthesis, rate, names)


def write_results(
    folder: Path,
    dataset: Dataset,
    rows: dict[str, dict[str, Any]],
    names: Sequence[str],
    bps: int | None,
) -> str:
    """Writes the means over files, also by domain, into OUTPUT/MODEL/rvqN/results.json.

    What else is there, as from metrics of torch models by the official toolkit, stays.

    Returns:
      What is wrong, if a metric is defined for no file, or "".
    """
    path = folder.parent / "results.json"
    results = _read_means(path)
    entry = results.setdefault(dataset.name, {})
    entry |= _means(rows, names)
    domains = {name: domain for _, name, domain in dataset.items if domain}
    for domain in sorted(set(domains.values())):
        means = _means({f: row for f, row in rows.items() if domains.get(f) == domain}, names)
        entry.setdefault("_domains", {}).setdefault(domain, {}).update(means)
    entry["_metric_errors"] = entry.get("_metric_errors", {}) | {
        name: [f"{f}: {row['_errors'][name]}" for f, row in rows.items() if name in row["_errors"]]
        for name in names
    }
    if bps is not None:
        results.setdefault("_meta", {})["bps"] = bps
    _write_results(path, results)
    if undefined := [name for name in names if name not in entry]:
        return (
            f"{folder}: {undefined[0]} is defined for no file: {_first_error(rows, undefined[0])}"
        )
    return ""


def _first_error(rows: dict[str, dict[str, Any]], name: str) -> str:
    return next(row["_errors"][name] for row in rows.values() if name in row["_errors"])


def _read_means(path: Path) -> dict[str, dict[str, Any]]:
    """A results.json, {} without it; ValueError where it is none."""
    results = read_json_object(path) if path.exists() else {}
    for name, entry in results.items():
        if name == "bps":  # where the official toolkit has once had it
            continue
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: {name} must be a JSON object, got {entry!r}")
        if odd := [m for m in (*COLUMNS, "bps") if not isinstance(entry.get(m, 0), (int, float))]:
            raise ValueError(f"{path}: {odd[0]} of {name} must be a number, got {entry[odd[0]]!r}")
    return results


def _means(rows: dict[str, dict[str, Any]], names: Sequence[str]) -> dict[str, float]:
    found = {name: [row[name] for row in rows.values() if name in row] for name in names}
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def write_means(folder: Path, dataset: Dataset, means: dict[str, float]) -> None:
    """Adds means over a data set to OUTPUT/MODEL/rvqN/results.json."""
    path = folder / "results.json"
    results = _read_means(path)
    results.setdefault(dataset.name, {}).update(means)
    _write_results(path, results)


def _write_results(path: Path, results: dict[str, Any]) -> None:
    files.write_text(path, json.dumps(results, indent=2, sort_keys=True, ensure_ascii=False))


def read_codes(folder: Path, dataset: Dataset, name: str, config: CodecConfig) -> np.ndarray:
    """The codes [Q, T] of a file, of OUTPUT/MODEL/codes/DATASET; ValueError where it is broken."""
    return codes.read(_code_file(folder, dataset, name), config).codes


def write_entropy(folder: Path, dataset: Dataset, config: CodecConfig) -> np.ndarray:
    """Bits per code that each quantizer uses on a data set, [Q]: entropy of its histogram.

    They go into OUTPUT/MODEL/entropy.json, by data set. Too little audio makes them too low: a
    codebook of 1024 wants some ten thousand frames.
    """
    counts: Any = 0
    for name in dataset.output_names():
        rows = read_codes(folder, dataset, name, config)
        size = config.quantizer.codebook_size
        counts = counts + np.stack([np.bincount(r, minlength=size) for r in rows])
    shares = counts / counts.sum(1, keepdims=True)
    bits = np.abs((shares * np.log2(np.where(shares > 0, shares, 1))).sum(1))
    path = folder / "entropy.json"
    known = read_json_object(path) if path.exists() else {}
    files.write_text(path, json.dumps(known | {dataset.name: bits.tolist()}) + "\n")
    return bits


def read_results(output: Path) -> dict[str, list[tuple[str, int | None, dict[str, float]]]]:
    """All results.json under `output`, also those of the official toolkit and of other codecs.

    Returns:
      Data set, or "data set, domain" -> (system, bit/s, metric -> mean), by system and bitrate.
    """
    rows: dict[str, list[tuple[str, Any, dict[str, float]]]] = {}
    for path in sorted(output.rglob("results.json")):
        results = _read_means(path)
        system, bps = (
            path.parent.relative_to(output).as_posix(),
            results.get("bps", results.get("_meta", {}).get("bps")),
        )
        for name, entry in results.items():
            if not name.startswith("_") and name != "bps":
                rows.setdefault(name, []).append((system, bps, entry))
                for domain, means in entry.get("_domains", {}).items():
                    rows.setdefault(f"{name}, {domain}", []).append((system, bps, means))
    for found in rows.values():
        found.sort(key=lambda row: (row[0].rpartition("/")[0], row[1] or 0))
    return rows


def cells_of(rows: Sequence[tuple[str, int | None, dict[str, float]]]) -> list[list[str]]:
    """A table of what `read_results` gives of a data set, its first row the column heads."""
    used = [c for c in COLUMNS if any(c in means for *_, means in rows)]
    cells = [
        [system, str(bps or ""), *(f"{means[c]:.3f}" if c in means else "" for c in used)]
        for system, bps, means in rows
    ]
    return [["", "bit/s", *used], *cells]


def write_summary(output: Path) -> str:
    """Writes summary.csv and summary.md, all results under `output` in one; the latter's text."""
    table, text = [], []
    for name, found in read_results(output).items():
        head, *body = ["| " + " | ".join(cells) + " |" for cells in cells_of(found)]
        text += [f"## {name}", "", head, "|---" * (head.count("|") - 1) + "|", *body, ""]
        for system, bps, means in found:
            table.append([name, system, bps, *(means.get(c) for c in COLUMNS)])
    for path in sorted(output.rglob("entropy.json")):
        for name, bits in read_json_object(path).items():
            text += [
                f"Bits used of a code, {path.parent.relative_to(output)} on {name}, by quantizer: "
                + " ".join(f"{b:.1f}" for b in bits),
                "",
            ]
    with io.StringIO(newline="") as lines:
        csv.writer(lines).writerows([["dataset", "system", "bps", *COLUMNS], *table])
        files.write_text(output / "summary.csv", lines.getvalue())
    files.write_text(output / "summary.md", "\n".join(text))
    return "\n".join(text)
