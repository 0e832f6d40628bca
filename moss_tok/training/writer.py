"""metrics.jsonl: one JSON object per logged step, each step once."""

import json
from pathlib import Path
from typing import Any

from moss_tok.audio import files
from moss_tok.config import parse_json_object

NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends lines to WORKDIR/metrics.jsonl; a context manager."""

    def __init__(self, workdir: Path, step: int):
        """Opens the file and cuts the lines after `step`, which will be computed again."""
        path = workdir / NAME
        if path.exists():
            kept = [r for r in read_metrics(workdir) if r["step"] <= step]
            text = "".join(json.dumps(row) + "\n" for row in kept)
            files.write_atomically(path, lambda file: file.write(text.encode()))
        self._file = open(path, "a")

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line; `step` is the number of steps done."""
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """All complete lines of metrics.jsonl."""
    rows = []
    for line in (workdir / NAME).read_text(errors="replace").splitlines():
        try:
            row = parse_json_object(line)
        except ValueError:  # a kill can leave half a line at the end
            break
        if not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows
