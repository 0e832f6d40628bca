"""Writes shards of codes: ArrayRecord, or JSON lines as the fine-tuning of MOSS-TTS reads them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moss_tok.audio.manifest import AudioItem
from moss_tok.data import codes


class Row(NamedTuple):
    """A recording with its codes [Q, T] int16, and its number of samples per channel."""

    item_id: str
    item: AudioItem
    codes: np.ndarray
    num_samples: int


def _write_array_record(path: Path, rows: Sequence[Row]) -> None:
    if not rows:  # an ArrayRecord file without records cannot be opened
        path.touch()
        return
    with codes.Writer(path) as writer:
        for row in rows:
            metadata = metadata_of(row.item)
            writer.write(codes.Item(row.item_id, row.codes, row.num_samples, metadata))


def _write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w") as file:
        for row in rows:
            reserved = {
                "id": row.item_id,
                "audio": str(row.item.path),
                "num_samples": row.num_samples,
            }
            # These keys come first, and metadata with the same names does not replace them.
            fields = reserved | metadata_of(row.item) | reserved
            if "text" not in fields and isinstance(fields.get("transcript"), str):
                fields["text"] = fields["transcript"]  # the fine-tuning reads this key
            fields["audio_codes"] = row.codes.T.tolist()
            file.write(json.dumps(fields) + "\n")


def metadata_of(item: AudioItem) -> dict[str, Any]:
    """The fields of a recording that are stored beside its codes."""
    fields = {"domain": item.domain, "split": item.split}
    for name, value in item.metadata.items():
        if name not in ("id", "audio_codes"):
            fields[name] = value
    return fields


WRITERS = {"arrayrecord": _write_array_record, "jsonl": _write_jsonl}
