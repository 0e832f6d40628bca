"""Reads JSON objects, JSON lines, and dataclasses from JSON fields."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any


def parse_json_object(text: str) -> dict[str, Any]:
    """Parses a JSON object; ValueError if the text is not one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a file with a JSON object; a ValueError names the file if it cannot be read."""
    try:
        return parse_json_object(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


def split_lines(text: str) -> list[str]:
    r"""The lines of a JSONL text: only \n ends a line, unlike in str.splitlines."""
    return text.removesuffix("\n").split("\n") if text else []


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line; [] if there is no file.

    Broken lines are skipped, because a process that was killed may leave one.
    """
    if not path.exists():
        return []
    rows = []
    for line in split_lines(path.read_text(errors="replace")):
        with contextlib.suppress(ValueError):
            rows.append(parse_json_object(line))
    return rows


def from_fields(cls: type, fields: dict[str, Any], what: str) -> Any:
    """An instance of a dataclass from its fields.

    Args:
      cls: The dataclass.
      fields: Values by name; missing ones take their defaults.
      what: Name of the object in error messages.

    Raises:
      ValueError: A key is unknown, or a key without default is missing.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(fields.keys() - known):
        accepted = ", ".join(sorted(known))
        raise ValueError(f"unknown key {unknown[0]!r} in {what}; accepted: {accepted}")
    required = set()
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING:
            required.add(field.name)
    if missing := sorted(required - fields.keys()):
        raise ValueError(f"missing key {missing[0]!r} in {what}")
    return cls(**fields)
