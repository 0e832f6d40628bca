"""Files of texts to speak: .txt, .jsonl, and the .lst of Seed-TTS-eval."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from moss_tok.json_files import parse_json_object, read_lines, shorten

SUFFIXES = (".txt", ".jsonl", ".lst")
_MAX_NAME_BYTES = 200  # file names have at most 255 bytes, and temporary ones are longer
_NOT_IN_NAMES = set("/\\\0|")  # the last one separates the fields of meta.lst


@dataclasses.dataclass(frozen=True)
class Row:
    """A text to speak.

    Attributes:
      name: Name of its file, without a suffix.
      text: What to say.
      prompt: File of the speaker's recording; "" for none.
      prompt_text: What is said in the prompt.
      details: Values of the form of the chat layout, by the names in `speech.layout.FORM`.
    """

    name: str
    text: str
    prompt: str = ""
    prompt_text: str = ""
    details: dict[str, str] = dataclasses.field(default_factory=dict)


def is_list(text: str) -> bool:
    """Whether a text is the name of a file of texts; ValueError if there is no such file."""
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        return False
    if path.is_file():
        return True
    if len(text.split()) > 1:  # a sentence that ends with a file's name
        return False
    raise ValueError(f"{text}: no such file of texts")


def read(path: Path, prompt: str = "", prompt_text: str = "") -> list[Row]:
    """Reads a file of texts.

    Args:
      path: The file.
      prompt: File of the speaker's recording, for the rows without one.
      prompt_text: What is said in it.

    Raises:
      ValueError: The file has no lines, a line is bad, or two rows have the same name.
    """
    parse = _PARSERS[path.suffix.lower()]
    rows: dict[str, Row] = {}
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = parse(line, f"{number:04}", path.parent)
            if not row.prompt:
                row = dataclasses.replace(row, prompt=prompt, prompt_text=prompt_text)
            _check(row)
            if row.name in rows:
                raise ValueError(f"another line has the id {row.name!r}, too")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        rows[row.name] = row
    if not rows:
        raise ValueError(f"{path}: no lines")
    return list(rows.values())


def _check(row: Row) -> None:
    is_short = 0 < len(row.name.encode(errors="replace")) <= _MAX_NAME_BYTES
    if not is_short or row.name.startswith(".") or set(row.name) & _NOT_IN_NAMES:
        raise ValueError(f"id must be a file's name, got {shorten(row.name)}")
    if row.prompt and not Path(row.prompt).is_file():
        raise ValueError(f"{row.prompt}: no such file")


def _parse_text(line: str, name: str, folder: Path) -> Row:
    del folder
    return Row(name, line.strip())


def _parse_object(line: str, name: str, folder: Path) -> Row:
    from moss_tok.speech.layout import FORM

    accepted = ("id", "text", "prompt", "prompt_text", *FORM)
    values = {}
    for key, value in parse_json_object(line).items():
        if key not in accepted:
            raise ValueError(f"unknown key {key!r}; accepted: {', '.join(accepted)}")
        if value is None:  # as if the key were missing
            continue
        if key == "id" and type(value) is int:
            value = str(value)
        if not isinstance(value, str):
            raise ValueError(f"{key} must be a text, got {value!r}")
        values[key] = value
    if "text" not in values:
        raise ValueError("text is missing")
    details = {key: values[key] for key in FORM if key in values}
    return _row(
        folder,
        values.get("id", name),
        values["text"],
        values.get("prompt", ""),
        values.get("prompt_text", ""),
        details,
    )


def _parse_seed_line(line: str, name: str, folder: Path) -> Row:
    """A line of a meta.lst: id|text of the prompt|prompt|text[|recording]."""
    parts = line.strip().split("|")
    if len(parts) not in (4, 5):
        raise ValueError(f"must be id|text of the prompt|prompt|text, got {shorten(line.strip())}")
    name, prompt_text, prompt, text = parts[:4]
    return _row(folder, name, text, prompt, prompt_text, {})


def _row(
    folder: Path, name: str, text: str, prompt: str, prompt_text: str, details: dict[str, str]
) -> Row:
    """A row whose prompt is relative to the folder of the list."""
    if prompt_text and not prompt:
        raise ValueError("the text of a prompt needs a prompt, the recording in which it is said")
    path = str(folder / prompt) if prompt else ""
    return Row(name, text, path, prompt_text, details)


_PARSERS = {".txt": _parse_text, ".jsonl": _parse_object, ".lst": _parse_seed_line}


def write_listing(folder: Path, rows: Sequence[Row]) -> None:
    """Writes meta.lst, with which the scripts of Seed-TTS-eval find what each file says."""
    from moss_tok.audio import files

    lines = []
    for row in rows:
        prompt = str(Path(row.prompt).absolute()) if row.prompt else ""
        fields = []
        for field in (row.name, row.prompt_text, prompt, row.text):
            fields.append(" ".join(field.replace("|", " ").split()))
        lines.append("|".join(fields) + "\n")
    files.write_text(folder / "meta.lst", "".join(lines))
