"""Adds copies of the training recordings of a manifest at other tempos.

  python experiments/stretch_tempo.py digits.jsonl OUT --copies=8

Writes OUT/manifest.jsonl with all rows of the manifest and, for each row of its train split,
`copies` more, as FLAC files in OUT. The pitch stays the same; --augment_speed, which changes both,
can be used in addition.
"""

import argparse
import json
from pathlib import Path

import librosa
import numpy as np

from moss_tok.audio import files, manifest


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("manifest")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument(
        "--max_change",
        type=float,
        default=0.3,
        help="limit of |log(tempo)|, natural logarithm",
    )
    args = parser.parse_args()
    try:
        items = manifest.find_items(args.manifest)
        args.output.mkdir(parents=True)
        rows = list(_rows(items, args))
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    files.write_text(args.output / "manifest.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    print(f"{args.output / 'manifest.jsonl'}: {len(items)} recordings, {len(rows)} rows")


def _rows(items, args):
    rng = np.random.default_rng(0)
    for number, item in enumerate(items):
        row = {"split": item.split, "domain": item.domain} | item.metadata
        yield row | {"path": str(Path(item.path).absolute()), "duration_s": item.duration_seconds}
        for copy in range(args.copies if item.split == "train" else 0):
            wav, rate = files.read_native(item.path)
            factor = np.exp(rng.uniform(-args.max_change, args.max_change))
            hop = max(1, rate // 250)  # 4 ms
            wav = librosa.effects.time_stretch(wav, rate=factor, n_fft=8 * hop, hop_length=hop)
            path = args.output.absolute() / f"{number}_{copy}.flac"
            files.write(path, wav, rate)
            yield row | {"path": str(path), "duration_s": wav.shape[1] / rate}


if __name__ == "__main__":
    main()
