"""Results of an evaluation: results.json and entropy.json of each codec, and their summary."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moss_tok.audio import files
from moss_tok.codec.inference import Codec
from moss_tok.errors import is_number
from moss_tok.evaluation import metrics, reconstruction
from moss_tok.evaluation.datasets import Dataset
from moss_tok.evaluation.scoring import Scores
from moss_tok.json_files import read_json_object

# These need a language model, see `transcription`.
TEXT_METRICS = ("wer", "cer")
# "sim" and "utmos" need torch models: they are kept if the official toolkit has written them.
COLUMNS = (*metrics.METRICS, *TEXT_METRICS, "sim", "utmos")


class Result(NamedTuple):
    """Results of a system on a data set.

    Attributes:
      system: Its folder, relative to OUTPUT, such as "MODEL/rvq8".
      bps: Bits per second; None if unknown.
      means: Metric -> mean over the recordings.
    """

    system: str
    bps: int | None
    means: dict[str, float]


def write_results(
    folder: Path,
    dataset: Dataset,
    scores: Scores,
    metric_names: Sequence[str],
    bps: int | None,
) -> str:
    """Writes means over all files and by domain into OUTPUT/MODEL/rvqN/results.json.

    Other entries stay, such as metrics of torch models by the official toolkit.

    Args:
      folder: OUTPUT/MODEL/rvqN/DATASET.
      dataset: The data set.
      scores: Scores of its files.
      metric_names: Metrics that were computed.
      bps: Bits per second; None if unknown.

    Returns:
      A problem if a metric is not defined for any file; otherwise "".
    """
    path = folder.parent / "results.json"
    results = _read_means(path)
    entry = results.setdefault(dataset.name, {})
    entry |= _means(scores.values(), metric_names)
    for domain, rows in _by_domain(dataset, scores).items():
        means_by_domain = entry.setdefault("_domains", {})
        means_by_domain.setdefault(domain, {}).update(_means(rows, metric_names))
    errors = entry.setdefault("_metric_errors", {})
    for name in metric_names:
        errors[name] = _list_errors(scores, name)
    if bps is not None:
        results.setdefault("_meta", {})["bps"] = bps
    _write_results(path, results)
    for name in metric_names:
        if name not in entry:
            return f"{folder}: {name} is not defined for any file: {_first_error(scores, name)}"
    return ""


def _by_domain(dataset: Dataset, scores: Scores) -> dict[str, list[dict[str, Any]]]:
    """Scores of the files with a domain, by domain in alphabetical order."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for _, name, domain in dataset.items:
        if domain and name in scores:
            groups.setdefault(domain, []).append(scores[name])
    return dict(sorted(groups.items()))


def _means(rows: Any, metric_names: Sequence[str]) -> dict[str, float]:
    """Means of the metrics over the files for which they are defined."""
    means = {}
    for name in metric_names:
        values = [row[name] for row in rows if name in row]
        if values:
            means[name] = float(np.mean(values))
    return means


def _list_errors(scores: Scores, metric_name: str) -> list[str]:
    errors = []
    for file_name, row in scores.items():
        if metric_name in row["_errors"]:
            errors.append(f"{file_name}: {row['_errors'][metric_name]}")
    return errors


def describe_failures(folder: Path, scores: Scores, metric_names: Sequence[str]) -> list[str]:
    """A line for each metric that is not defined for some of the files.

    Args:
      folder: OUTPUT/MODEL/rvqN/DATASET.
      scores: Scores of its files.
      metric_names: Metrics that were computed.
    """
    lines = []
    for name in metric_names:
        errors = _list_errors(scores, name)
        if errors:
            lines.append(
                f"{folder.parent.name}, {folder.name}: {name} is left out for {len(errors)} of "
                f"{len(scores)} recordings; {errors[0]}"
            )
    return lines


def _first_error(scores: Scores, metric_name: str) -> str:
    for row in scores.values():
        if metric_name in row["_errors"]:
            return row["_errors"][metric_name]
    return "no file was scored"


def _read_means(path: Path) -> dict[str, dict[str, Any]]:
    """Reads a results.json; {} if there is none; ValueError if it has another form."""
    results = read_json_object(path) if path.exists() else {}
    for name, entry in results.items():
        if name == "bps":  # older versions of the official toolkit put the rate here
            _check_number(path, name, entry)
            continue
        _check_means(path, name, entry)
        domains = entry.get("_domains", {})
        if not isinstance(domains, dict):
            raise ValueError(f"{path}: _domains of {name} must be a JSON object, got {domains!r}")
        for domain, means in domains.items():
            _check_means(path, f"{name}, {domain}", means)
    return results


def _check_means(path: Path, name: str, means: Any) -> None:
    """Raises ValueError unless the means over a data set are numbers by name of the metric."""
    if not isinstance(means, dict):
        raise ValueError(f"{path}: {name} must be a JSON object, got {means!r}")
    for metric_name in (*COLUMNS, "bps"):
        if metric_name in means:
            _check_number(path, f"{metric_name} of {name}", means[metric_name])


def _check_number(path: Path, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{path}: {name} must be a number, got {value!r}")


def write_means(folder: Path, dataset: Dataset, means: dict[str, float]) -> None:
    """Adds means over a data set to OUTPUT/MODEL/rvqN/results.json."""
    path = folder / "results.json"
    results = _read_means(path)
    results.setdefault(dataset.name, {}).update(means)
    _write_results(path, results)


def _write_results(path: Path, results: dict[str, Any]) -> None:
    files.write_text(path, json.dumps(results, indent=2, sort_keys=True, ensure_ascii=False))


def write_entropy(folder: Path, dataset: Dataset, codec: Codec) -> np.ndarray:
    """Bits per code that each quantizer uses on a data set, [Q]: the entropy of its histogram.

    OUTPUT/MODEL/entropy.json gets them under the name of the data set. Too little audio gives too
    low values: a codebook of 1024 entries needs about ten thousand frames.
    """
    config = codec.config.quantizer
    counts = np.zeros((config.num_quantizers, config.codebook_size), np.int64)
    for name in dataset.output_names():
        codes = reconstruction.read_codes(folder, dataset, name, codec)
        for quantizer, row in enumerate(codes):
            counts[quantizer] += np.bincount(row, minlength=config.codebook_size)
    shares = counts / counts.sum(1, keepdims=True)
    logs = np.log2(np.where(shares > 0, shares, 1))
    bits = np.abs((shares * logs).sum(1))
    path = folder / "entropy.json"
    entropy = read_json_object(path) if path.exists() else {}
    entropy[dataset.name] = bits.tolist()
    files.write_text(path, json.dumps(entropy) + "\n")
    return bits


def read_entropy(output: Path) -> Iterator[tuple[str, list[float]]]:
    """Yields a caption and the bits per quantizer, for each codec and data set."""
    for path in sorted(output.rglob("entropy.json")):
        codec = path.parent.relative_to(output)
        for name, bits in read_json_object(path).items():
            if not isinstance(bits, list) or not all(map(is_number, bits)):
                raise ValueError(f"{path}: {name} must be a list of numbers, got {bits!r}")
            yield f"Bits used of a code, {codec} on {name}", bits


def read_results(output: Path) -> dict[str, list[Result]]:
    """Reads all results.json under `output`, also those of the official toolkit and of baselines.

    Returns:
      Data set, or "data set, domain" -> results, sorted by system and bitrate.
    """
    table: dict[str, list[Result]] = {}
    for path in sorted(output.rglob("results.json")):
        results = _read_means(path)
        system = path.parent.relative_to(output).as_posix()
        meta = results.get("_meta", {})
        bps = results.get("bps", meta.get("bps"))
        for name, entry in results.items():
            if name.startswith("_") or name == "bps":
                continue
            table.setdefault(name, []).append(Result(system, bps, entry))
            for domain, means in entry.get("_domains", {}).items():
                result = Result(system, bps, means)
                table.setdefault(f"{name}, {domain}", []).append(result)
    for rows in table.values():
        rows.sort(key=_codec_and_rate)
    return table


def _codec_and_rate(result: Result) -> tuple[str, int]:
    codec = result.system.rpartition("/")[0]
    return codec, result.bps or 0


def to_cells(rows: Sequence[Result]) -> list[list[str]]:
    """A table of the results on a data set; its first row holds the column heads."""
    columns = []
    for name in COLUMNS:
        if any(name in row.means for row in rows):
            columns.append(name)
    table = [["", "bit/s", *columns]]
    for row in rows:
        values = [format_value(row.means, name) for name in columns]
        table.append([row.system, str(row.bps or ""), *values])
    return table


def format_value(means: dict[str, float], name: str) -> str:
    """A mean with three decimals, "" if there is none."""
    return f"{means[name]:.3f}" if name in means else ""


def write_summary(output: Path) -> str:
    """Writes all results under `output` as summary.csv and summary.md; returns the latter."""
    lines = []
    table: list[list[Any]] = [["dataset", "system", "bps", *COLUMNS]]
    for name, rows in read_results(output).items():
        lines += [f"## {name}", "", *_markdown_table(to_cells(rows)), ""]
        for row in rows:
            values = [row.means.get(column) for column in COLUMNS]
            table.append([name, row.system, row.bps, *values])
    for caption, bits in read_entropy(output):
        values = " ".join(f"{value:.1f}" for value in bits)
        lines += [f"{caption}, by quantizer: {values}", ""]
    with io.StringIO(newline="") as text:
        csv.writer(text).writerows(table)
        files.write_text(output / "summary.csv", text.getvalue())
    markdown = "\n".join(lines)
    files.write_text(output / "summary.md", markdown)
    return markdown


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; the first row holds the column heads."""
    lines = []
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return lines
