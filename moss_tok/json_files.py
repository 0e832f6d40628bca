"""Reads JSON objects, JSON lines, and dataclasses from JSON fields."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_MAX_SHOWN = 60  # characters of a bad line or text in its error message


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


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, blank ones included.

    Lines may end in CR LF, and the file may begin with a byte-order mark, because editors and
    spreadsheets write such files.

    Raises:
      ValueError: The file is not UTF-8 text.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8 text") from error
    lines = re.split("\r\n|\n|\r", text)
    return lines if lines[-1] else lines[:-1]


def parse_json_line(line: str, place: str, example: str = "") -> dict[str, Any]:
    """The object in a line of a JSONL file.

    Args:
      line: The text.
      place: "FILE:NUMBER", for the error message.
      example: A valid line, for the error message.

    Raises:
      ValueError: The line is not a JSON object.
    """
    try:
        return parse_json_object(line)
    except ValueError as error:
        expected = f"a JSON object like {example}" if example else "a JSON object"
        message = f"must be {expected}, got {shorten(line)} ({error})"
        raise ValueError(f"{place}: {message}") from error


def shorten(line: str) -> str:
    """The beginning of a line or text, in quotes, for error messages."""
    if len(line) > _MAX_SHOWN:
        line = line[:_MAX_SHOWN] + "..."
    return repr(line)


def read_json_lines(
    path: Path,
    example: str = "",
    blank_lines: bool = True,
) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each after its place "FILE:NUMBER" for error messages.

    Args:
      path: The file.
      example: A valid line, for error messages.
      blank_lines: Whether the file may have blank lines.

    Raises:
      ValueError: The file is not UTF-8 text, or a line is not a JSON object.
      OSError: The file cannot be read.
    """
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        place = f"{path}:{number}"
        if line.strip():
            rows.append((place, parse_json_line(line, place, example)))
        elif not blank_lines:
            raise ValueError(f"{place}: a blank line")
    return rows


def format_json(value: Any) -> str:
    """The text of a JSON file with this value, indented."""
    return json.dumps(value, indent=2) + "\n"


def format_json_lines(rows: Iterable[dict[str, Any]]) -> str:
    """The text of a JSONL file with these objects."""
    lines = [json.dumps(row) + "\n" for row in rows]
    return "".join(lines)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file to which a program appends; [] if there is no file.

    Broken lines are skipped, because a process that was killed may leave one.
    """
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").split("\n"):
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
    known = set()
    required = set()
    for field in dataclasses.fields(cls):
        known.add(field.name)
        if field.default is dataclasses.MISSING:
            required.add(field.name)
    unknown = sorted(fields.keys() - known)
    if unknown:
        accepted = ", ".join(sorted(known))
        raise ValueError(f"unknown key {unknown[0]!r} in {what}; accepted: {accepted}")
    missing = sorted(required - fields.keys())
    if missing:
        raise ValueError(f"missing key {missing[0]!r} in {what}")
    return cls(**fields)
