"""Shards of codes, as `moss-tok tokenize` writes them: ArrayRecord or JSON lines.

A record is a msgpack map: `id`, `codes` (int16 little-endian, [Q, T] row by row), `num_quantizers`,
`num_samples`, `metadata` (`domain`, `transcript`, ... if known).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from moss_tok import storage, summary
from moss_tok.data import records
from moss_tok.data.config import PLAN
from moss_tok.json_files import parse_json_line, parse_json_object, read_json_object, read_lines


@dataclasses.dataclass(frozen=True)
class Item:
    """The codes of one recording.

    Attributes:
      id: Id of the recording in its data set.
      codes: [Q, T] int16.
      num_samples: Samples per channel at the codec's rate.
      metadata: Domain, transcript and other known properties.
    """

    id: str
    codes: np.ndarray
    num_samples: int
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        codes = summary.describe_array(self.codes)
        keys = list(self.metadata)
        return f"Item({self.id!r}, codes: {codes}, {self.num_samples} samples, metadata: {keys})"


class Writer:
    """Writes items into one ArrayRecord shard; a context manager."""

    def __init__(self, path: Path):
        self._writer = ArrayRecordWriter(str(path), "group_size:1")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, item: Item) -> None:
        """Adds an item."""
        fields = {
            "id": item.id,
            "codes": np.ascontiguousarray(item.codes, "<i2").tobytes(),
            "num_quantizers": item.codes.shape[0],
            "num_samples": item.num_samples,
            "metadata": item.metadata,
        }
        self._writer.write(msgpack.packb(fields))


class LineSource:
    """Random access to the lines of a file for fine-tuning MOSS-TTS: a data source for grain.

    A line is an object with `audio_codes` (lists [T, Q]), `text`, and optionally `ref_audio_codes`
    (lists [T, Q]) or `reference_audio_codes` (a list with these, and null for other speakers),
    `language`, `instruction`, ...

    Attributes:
      folder: The file.
      settings: {}, because such a file does not say which codec made its codes.
    """

    def __init__(self, path: str | storage.Path):
        """Finds the lines; a file in a bucket is copied first."""
        self.folder = storage.to_path(path)
        self.settings: dict[str, Any] = {}
        (self._copy,) = records.local_copies([self.folder])
        self._lines: list[tuple[int, int, int]] = []  # (first byte, number of bytes, line number)
        first_byte = 0
        with self._copy.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._lines.append((first_byte, len(line), number))
                first_byte += len(line)

    def __repr__(self) -> str:
        return f"LineSource({str(self.folder)!r}, {summary.count(len(self), 'item')})"

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[Item]:
        for index in range(len(self)):
            yield self[index]

    def __getitem__(self, index: int) -> Item:
        first_byte, num_bytes, number = self._lines[index]
        with self._copy.open("rb") as file:
            file.seek(first_byte)
            line = file.read(num_bytes)
        try:
            fields = parse_json_object(line.decode("utf-8-sig"))
            codes = from_lists("audio_codes", fields.pop("audio_codes", None))
            reference = _pop_reference(fields)
            if reference is not None:
                fields[REFERENCE] = reference
            if not isinstance(fields.get("text"), str):
                raise ValueError(f"text must be a string, got {fields.get('text')!r}")
        except ValueError as error:
            raise ValueError(f"{self.folder}:{number}: {error}") from error
        fields["transcript"] = fields.pop("text")
        return Item(str(fields.pop("id", index)), codes, 0, fields)


REFERENCE = "reference"  # key of the metadata: codes [Q, T] of another recording of the speaker


def reference_of(metadata: Mapping[str, Any]) -> np.ndarray | None:
    """The codes [Q, T] of REFERENCE; None without them, or if a user's key has this name."""
    codes = metadata.get(REFERENCE)
    return codes if isinstance(codes, np.ndarray) else None


def _pop_reference(fields: dict[str, Any]) -> np.ndarray | None:
    """Removes the reference of a line from its fields; ValueError if there are several speakers."""
    lists = fields.pop("ref_audio_codes", None)
    by_speaker = fields.pop("reference_audio_codes", None)
    if by_speaker is not None:
        if not isinstance(by_speaker, list) or not by_speaker or any(by_speaker[1:]):
            raise ValueError("reference_audio_codes must be a list with one reference")
        lists = by_speaker[0]
    return None if lists is None else from_lists("a reference", lists)


def from_lists(name: str, lists: Any) -> np.ndarray:
    """Codes [Q, T] int16 from lists [T, Q], which the fine-tuning file has under the key `name`.

    Raises:
      ValueError: The value is no such list.
    """
    try:
        codes = np.array(lists)
    except ValueError:  # rows of different lengths
        codes = np.array(None)
    if codes.ndim != 2 or codes.dtype.kind != "i" or not codes.size:
        raise ValueError(f"{name} must be lists of integers [T, Q] of equal length")
    if codes.min() < 0 or codes.max() >= 2**15:
        raise ValueError(f"{name} must be codes of at least 0, got {codes.min()}..{codes.max()}")
    return codes.T.astype(np.int16)


def open_source(path: str | storage.Path) -> "CodeSource | LineSource":
    """The items of a folder of shards, or of a file of JSON lines."""
    path = storage.to_path(path)
    return LineSource(path) if path.is_file() else CodeSource(path)


class CodeSource:
    """Random access to the items of a folder of shards: a data source for grain.

    Attributes:
      settings: The content of plan.json: "codec", its fingerprint; "num_quantizers"; "format"; ...
    """

    def __init__(self, folder: str | storage.Path):
        """Opens the shards. Shards in buckets are copied first.

        Raises:
          ValueError: The folder has no plan.json, or not all shards.
        """
        self.folder = storage.to_path(folder)
        plan = self.folder / PLAN
        if not plan.is_file():
            raise ValueError(f"{folder}: no {PLAN}, so no output of moss-tok tokenize")
        self.settings = read_json_object(plan)
        if "format" not in self.settings:
            raise ValueError(f"{plan}: has no format, so no output of moss-tok tokenize")
        paths = sorted(self.folder.glob("codes-*-of-*"))
        if not paths:
            raise ValueError(f"{folder}: 0 of its shards are there")
        num_shards = int(paths[0].stem.rsplit("-", 1)[1])
        if len(paths) != num_shards:
            raise ValueError(f"{folder}: {len(paths)} of {num_shards} shards are there")
        paths = records.local_copies(paths)
        self._lines: list[tuple[str, str]] | None = None  # ("FILE:NUMBER", text)
        if self.settings["format"] == "jsonl":
            self._lines = []
            for path in paths:
                for number, line in enumerate(read_lines(path), 1):
                    self._lines.append((f"{path}:{number}", line))
        else:
            # An empty file is a shard without records.
            filled = [path for path in paths if path.stat().st_size]
            self._source = records.open_shards(filled) if filled else []

    def __repr__(self) -> str:
        return f"CodeSource({str(self.folder)!r}, {summary.count(len(self), 'item')})"

    def __len__(self) -> int:
        return len(self._source if self._lines is None else self._lines)

    def __iter__(self) -> Iterator[Item]:
        for index in range(len(self)):
            yield self[index]

    def __getitem__(self, index: int) -> Item:
        if self._lines is not None:
            place, line = self._lines[index]
            fields = parse_json_line(line, place)
            missing = {"id", "audio_codes", "num_samples"} - fields.keys()
            if missing:
                raise ValueError(f"{place}: has no {min(missing)}")
            codes = np.array(fields.pop("audio_codes"), np.int16).T
            return Item(fields.pop("id"), codes, fields.pop("num_samples"), fields)
        fields = msgpack.unpackb(self._source[index])
        values = np.frombuffer(fields["codes"], "<i2")
        codes = values.reshape(fields["num_quantizers"], -1)
        return Item(fields["id"], codes, fields["num_samples"], fields["metadata"])


def read_codes(folder: str | storage.Path) -> CodeSource:
    """The items of a folder that `moss-tok tokenize` has written.

    Returns:
      A data source for grain: `grain.MapDataset.source(read_codes(folder))`.

    Raises:
      ValueError: The folder is no output of `moss-tok tokenize`, or the run is not finished.
    """
    return CodeSource(folder)
