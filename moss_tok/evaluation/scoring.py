"""Computes the metrics of reconstructed files in several processes; an interrupted run resumes."""

import contextlib
import functools
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from moss_tok.audio import files, notes
from moss_tok.evaluation import metrics
from moss_tok.evaluation.datasets import Dataset
from moss_tok.json_files import read_log

# File -> metric -> value, and "_errors": metric -> why it is not defined.
Scores = dict[str, dict[str, Any]]


def score(
    folder: Path,
    dataset: Dataset,
    metric_names: Sequence[str],
    num_workers: int,
    progress: Callable[[], Any] = lambda: None,
) -> Scores:
    """Scores the files of OUTPUT/MODEL/rvqN/DATASET that scores.jsonl does not have yet.

    Args:
      folder: OUTPUT/MODEL/rvqN/DATASET.
      dataset: The data set.
      metric_names: Metrics to compute.
      num_workers: Number of processes.
      progress: Called after each file.

    Returns:
      The scores of all files of the data set.
    """
    path = folder / "scores.jsonl"
    scores = read_scores(path)
    missing = {}
    for name in dataset.output_names():
        missing_metrics = _missing_metrics(scores.get(name, {}), metric_names)
        if missing_metrics:
            missing[name] = missing_metrics
        else:
            progress()
    if missing:
        # The file is rewritten, because an interrupted run may have left an incomplete last line.
        lines = [_to_line(name, row) for name, row in scores.items()]
        files.write_text(path, "".join(lines))
        with path.open("a") as file, _pool(num_workers) as map_in_processes:
            results = map_in_processes(
                functools.partial(_score, folder), missing.keys(), missing.values()
            )
            for name, (values, errors) in zip(missing, results, strict=True):
                row = scores.setdefault(name, {})
                row |= values | {"_errors": row.get("_errors", {}) | errors}
                file.write(_to_line(name, values | {"_errors": errors}))
                file.flush()
                progress()
    return {name: scores.get(name, {"_errors": {}}) for name in dataset.output_names()}


def _missing_metrics(row: dict[str, Any], metric_names: Sequence[str]) -> list[str]:
    """The metrics for which a row has neither a value nor an error."""
    known = row.keys() | row.get("_errors", {}).keys()
    return [name for name in metric_names if name not in known]


@contextlib.contextmanager
def _pool(num_workers: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """A function like `map` that computes in several processes."""
    if num_workers <= 1:  # another process would have to import everything again
        yield map
        return
    notes.share_with_workers()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        yield pool.map


def read_scores(path: Path) -> Scores:
    """Reads a scores.jsonl, in which a file may have several lines; {} if there is none."""
    scores: Scores = {}
    for row in read_log(path):
        if not {"name", "_errors"} <= row.keys():
            continue
        known = scores.setdefault(row.pop("name"), {})
        errors = known.get("_errors", {}) | row.pop("_errors")
        known |= row | {"_errors": errors}
    return scores


def _to_line(name: str, row: dict[str, Any]) -> str:
    return json.dumps({"name": name} | row) + "\n"


def _score(
    folder: Path,
    name: str,
    metric_names: Sequence[str],
) -> tuple[dict[str, float], dict[str, str]]:
    reference, rate = files.read_native(folder / "gt_audios" / name)
    synthesis, _ = files.read_native(folder / "syn_audios" / name)
    return metrics.compute_each(reference, synthesis, rate, metric_names)
