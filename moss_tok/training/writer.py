"""Log files of a run: metrics.jsonl, evaluation.jsonl, TensorBoard, curves.png and samples.

A step has one line: a resumed run first removes the lines after the step that it resumes from.
"""

from pathlib import Path
from typing import Any

import numpy as np
import tensorboardX

from moss_tok import storage
from moss_tok.audio import files
from moss_tok.audio.manifest import DOMAINS
from moss_tok.evaluation import report
from moss_tok.json_files import format_json_lines, read_log
from moss_tok.training.optimizer import learning_rate
from moss_tok.training.state import Recipe, TrainState

METRICS = "metrics.jsonl"
EVALUATION = "evaluation.jsonl"


def summarize(recipe: Recipe, state: TrainState) -> dict[str, Any]:
    """A line of metrics.jsonl: means since the last line, also per domain, and objective values.

    Domains without items and terms that no item had are left out. If all updates were skipped, all
    means are left out.
    """
    totals = state.totals
    objective = recipe.objective
    steps = float(totals.steps)
    values: dict[str, Any] = {}
    if steps:
        for name, total in totals.metrics.items():
            values[name] = float(total) / steps
        for name in objective.masked_terms:
            share = values.pop(f"{name}_steps")
            mean = values.pop(name)
            if share:  # otherwise no item had this term
                values[name] = mean / share
    for number, domain in enumerate(DOMAINS):
        items = float(totals.domain_items[number])
        if not items:
            continue
        for name, sums in totals.domain_terms.items():
            values[f"{domain}/{name}"] = float(sums[number]) / items
    schedule = learning_rate(recipe.optimizer, recipe.optimizer.learning_rate)
    values["learning_rate"] = float(schedule(int(state.step) - 1))
    values |= objective.summary(state.extra)
    values["skipped_updates"] = int(totals.skipped)
    values["failed_reads"] = int(totals.failed_reads)
    return values


class MetricsWriter:
    """Appends to the log files of a workdir; a context manager.

    For a workdir in a bucket, it works on a local copy.
    """

    def __init__(self, mirror: storage.Mirror, step: int):
        """Opens the files and removes lines after `step`."""
        self._mirror = mirror
        self._workdir = mirror.local
        mirror.fetch(METRICS, EVALUATION)
        self._files = {}
        for name in (METRICS, EVALUATION):
            self._files[name] = _open(self._workdir / name, step)
        folder = str(self._workdir / "tensorboard")
        self._board = tensorboardX.SummaryWriter(folder, purge_step=step + 1, write_to_disk=True)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for file in self._files.values():
            file.close()
        self._board.close()
        try:
            self._mirror.send()
        except (ValueError, OSError):
            if kind is None:  # otherwise the error inside the context is more important
                raise

    def send(self) -> None:
        """Uploads the files to the bucket, if the workdir is in one."""
        self._board.flush()
        self._mirror.send()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes a line of metrics.jsonl; `step` is the number of steps done."""
        self._write(METRICS, step, values)
        for name, value in values.items():
            if isinstance(value, list):
                self._board.add_histogram(name, np.asarray(value), step)
                for number, entry in enumerate(value):
                    self._board.add_scalar(f"{name}/{number:02d}", entry, step)
            else:
                tag = name if "/" in name else f"train/{name}"
                self._board.add_scalar(tag, value, step)

    def write_evaluation(
        self,
        step: int,
        table: dict[str, dict[str, dict[str, float]]],
        text: str,
    ) -> None:
        """Writes metric averages {domain: {system: {metric: mean}}}, and `text` for readers."""
        self._files[EVALUATION].close()  # to replace an earlier evaluation of this step
        self._files[EVALUATION] = _open(self._workdir / EVALUATION, step - 1)
        self._write(EVALUATION, step, {"table": table})
        files.write_text(self._workdir / "evaluation.md", f"Step {step}\n\n{text}\n")
        for domain, systems in table.items():
            for system, metrics in systems.items():
                for metric, value in metrics.items():
                    self._board.add_scalar(f"evaluation_{domain}_{metric}/{system}", value, step)

    def write_samples(
        self,
        step: int,
        samples: dict[str, dict[str, np.ndarray]],
        sample_rate: int,
    ) -> None:
        """Writes [C, S] audio {domain: {name: wav}} and its spectrograms; files are overwritten."""
        folder = self._workdir / "samples"
        folder.mkdir(exist_ok=True)
        for domain, wavs in samples.items():
            for name, wav in wavs.items():
                file_name = f"{domain}_{name.replace(' ', '_')}.wav"
                files.write(folder / file_name, wav, sample_rate)
                mono = wav.mean(0)
                self._board.add_audio(f"{domain}/{name}", mono, step, sample_rate)
            picture = report.save_spectrograms(folder / f"{domain}.png", wavs, sample_rate)
            self._board.add_image(f"spectrograms/{domain}", picture, step, dataformats="HWC")

    def save_curves(self) -> None:
        """Draws curves.png from metrics.jsonl."""
        rows = read_rows(self._workdir / METRICS)
        report.save_curves(self._workdir / "curves.png", rows)

    def _write(self, name: str, step: int, values: dict[str, Any]) -> None:
        self._files[name].write(format_json_lines([{"step": step} | values]))
        self._files[name].flush()


def _open(path: Path, step: int) -> Any:
    """Opens a log file to append to it; removes lines after `step`."""
    if path.exists():
        rows = [row for row in read_rows(path) if row["step"] <= step]
        files.write_text(path, format_json_lines(rows))
    return open(path, "a")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All complete lines of metrics.jsonl or evaluation.jsonl."""
    return [row for row in read_log(path) if isinstance(row.get("step"), int)]
