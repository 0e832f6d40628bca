"""Lists a clone of the Free Spoken Digit Dataset for training, validation and test.

  git clone https://github.com/Jakobovski/free-spoken-digit-dataset fsdd
  python experiments/fsdd.py fsdd/recordings digits/

Writes three manifests to OUT, by the number at the end of a recording's name:

  train.jsonl       5 and more, as the data set's own training split
  validation.jsonl  1 to 4, to choose settings
  test.jsonl        0, as the test clips of the corpus, with one more speaker

The last two have the split "test", which is what train.py evaluates.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from moss_tok.audio import files
from moss_tok.cli.commands import Parser
from moss_tok.errors import exit_code

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NAME = re.compile(r"(\d)_([a-z]+)_(\d+)")  # digit, speaker, number
PARTS = ("train", "validation", "test")
_FIRST_TRAINING_NUMBER = 5


def list_recordings(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The lines of each manifest, by its name.

    Raises:
      ValueError: The folder does not exist, or has no recordings for one of the manifests.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    rows: dict[str, list[dict[str, str]]] = {part: [] for part in PARTS}
    for path in sorted(folder.glob("*.wav")):
        name = _NAME.fullmatch(path.stem)
        if name is None:
            continue
        digit, speaker, number = name.groups()
        part = _part(int(number))
        row = {
            "path": str(path.absolute()),
            "split": "train" if part == "train" else "test",
            "domain": "speech",
            "transcript": WORDS[int(digit)],
            "speaker": speaker,
        }
        rows[part].append(row)
    for part in PARTS:
        if not rows[part]:
            raise ValueError(f"{folder}: no recordings DIGIT_SPEAKER_NUMBER.wav for {part}.jsonl")
    return rows


def _part(number: int) -> str:
    if number == 0:
        return "test"
    return "train" if number >= _FIRST_TRAINING_NUMBER else "validation"


def write_manifests(recordings: Path, output: Path) -> None:
    """Writes the three manifests, and prints how many recordings they list."""
    rows = list_recordings(recordings)
    output.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        path = output / f"{part}.jsonl"
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows[part]))
        print(f"{path}: {len(rows[part])} recordings")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the manifests; returns 2 after a user error."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("recordings", type=Path, help="the folder of that name in the clone")
    parser.add_argument("output", type=Path, metavar="OUT")
    args: argparse.Namespace = parser.parse_args(argv)
    return exit_code(lambda: write_manifests(args.recordings, args.output))


if __name__ == "__main__":
    sys.exit(main())
