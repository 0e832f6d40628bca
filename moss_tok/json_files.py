"""JSON objects, JSON lines, and dataclasses made of them; errors name what is wrong."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any


def parse_json_object(text: str) -> dict[str, Any]:
    """Parses a JSON object; ValueError if it is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a file with a JSON object; ValueError names the file if it holds something else."""
    try:
        return parse_json_object(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


def split_lines(text: str) -> list[str]:
    """The lines of a JSONL text; its strings may hold what else ends a line."""
    return text.removesuffix("\n").split("\n") if text else []


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line, without lines that a kill has cut; [] without it."""
    rows = []
    for line in split_lines(path.read_text(errors="replace")) if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(parse_json_object(line))
    return rows


def from_fields(cls: type, fields: dict[str, Any], what: str) -> Any:
    """A dataclass from its fields; ValueError names an unknown or missing key of `what`."""
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(fields.keys() - known):
        raise ValueError(f"unknown key {unknown[0]!r} in {what}; accepted: {', '.join(known)}")
    required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    if missing := sorted(required - fields.keys()):
        raise ValueError(f"missing key {missing[0]!r} in {what}")
    return cls(**fields)
