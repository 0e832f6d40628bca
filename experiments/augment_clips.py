"""Adds augmented copies of the training recordings of a manifest.

  python experiments/augment_clips.py digits.jsonl OUT --copies=8 --tempo=0.3 --augment_gain_db=6

Writes OUT/manifest.jsonl with all rows of the manifest and, for each row of its train split,
`copies` more, as FLAC files in OUT. Training on codes needs this, because codes cannot be
augmented. A copy is augmented as the flags of train.py say that begin with augment_; then its
tempo is changed, which keeps the pitch.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import librosa
import numpy as np

from moss_tok import settings
from moss_tok.audio import files, manifest
from moss_tok.audio.manifest import AudioItem
from moss_tok.data.config import AudioDataConfig
from moss_tok.data.pipeline import Segment, SegmentShape
from moss_tok.data.sources import FileSource
from moss_tok.errors import exit_code

_AUGMENTATIONS = [
    field for field in settings.leaf_fields(AudioDataConfig) if field.name.startswith("augment_")
]
_ANY_LEVEL_DB = -1000.0  # a quiet recording must not be replaced by one with another text


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the folder; returns 2 after a user error."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("manifest")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample_rate", type=int, default=24000, help="of the copies, in Hz")
    parser.add_argument(
        "--tempo", type=float, default=0.0, help="limit of |log(tempo)|, natural logarithm"
    )
    for field in _AUGMENTATIONS:
        kind = type(settings.flag_default(field))
        text = field.metadata["help"].replace("%", "%%")
        parser.add_argument(f"--{field.name}", type=kind, help=text)
    args = parser.parse_args(argv)
    return exit_code(lambda: _write(args))


def _write(args: argparse.Namespace) -> None:
    """Writes the copies and their manifest."""
    items = manifest.find_items(args.manifest)
    segments = _segments(items, args)
    args.output.mkdir(parents=True)
    rows = list(_rows(items, segments, args))
    files.write_text(args.output / "manifest.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    print(f"{args.output / 'manifest.jsonl'}: {len(items)} recordings, {len(rows)} rows")


def _segments(items: Sequence[AudioItem], args: argparse.Namespace) -> Segment:
    """A function that reads and augments a whole recording, by its index in `items`."""
    flags = {"silence_db": _ANY_LEVEL_DB}
    for field in _AUGMENTATIONS:
        value = getattr(args, field.name)
        if value is not None:
            flags[field.name] = value
    config = settings.build(AudioDataConfig, flags)
    longest = max(item.duration_seconds for item in items) * (1 + config.augment_speed)
    longest += config.augment_shift_seconds
    shape = SegmentShape(int(np.ceil(longest * args.sample_rate)), args.sample_rate, 1)
    return Segment(config, (FileSource(items, longest),), 0, shape)


def _rows(
    items: Sequence[AudioItem], segments: Segment, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The rows of the new manifest; writes the copies."""
    for number, item in enumerate(items):
        row = {"split": item.split, "domain": item.domain} | item.metadata
        yield row | {"path": str(Path(item.path).absolute()), "duration_s": item.duration_seconds}
        num_copies = args.copies if item.split == "train" else 0
        for copy in range(num_copies):
            rng = np.random.default_rng((args.seed, number, copy))
            wav = _copy(segments, number, rng, args)
            path = args.output.absolute() / f"{number}_{copy}.flac"
            files.write(path, wav, args.sample_rate)
            yield row | {"path": str(path), "duration_s": wav.shape[1] / args.sample_rate}


def _copy(
    segments: Segment, number: int, rng: np.random.Generator, args: argparse.Namespace
) -> np.ndarray:
    """An augmented copy [1, S] of a recording; ValueError if it cannot be read."""
    segment = segments.random_map(number, rng)
    if (segment["failed"] >= 0).any():
        raise ValueError(f"recording {number} of {args.manifest} cannot be read")
    wav = segment["wav"][:, : segment["length"]]
    if not args.tempo:
        return wav
    hop = max(1, args.sample_rate // 125)  # 8 ms
    factor = np.exp(rng.uniform(-args.tempo, args.tempo))
    return librosa.effects.time_stretch(wav, rate=factor, n_fft=4 * hop, hop_length=hop)


if __name__ == "__main__":
    sys.exit(main())
