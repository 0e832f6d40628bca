"""Compares the voices of generated speech with those of people, by a published speaker encoder.

    pip install resemblyzer
    python experiments/voice_similarity.py voices/voices.jsonl

voices.jsonl and its audio are those of `speech_study.py voices`. Resemblyzer (a speaker encoder of
256 dimensions, with weights in its package) was trained on other speakers; its similarity of two
recordings is the cosine of their embeddings. A recording is repeated until it has 1.6 s, the length
that the encoder was trained on.

A speaker's voice is the mean embedding of the speaker's recordings, without the recording that is
compared. The table has the mean similarity to the voice that was asked for (that of the prompt;
without a prompt, that of the person who says the text in the test) and to the other voices, and how
often the voice that was asked for is the nearest one. The first row is the calibration: people.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moss_tok.cli.commands import Parser
from moss_tok.errors import exit_code
from moss_tok.json_files import read_json_lines

RATE = 16000  # of the encoder
_MIN_SAMPLES = 25600
_LEVEL = 10 ** (-30 / 20)  # root mean square; louder recordings stay as they are
PEOPLE = "people"


def embed(path: Path, encoder: Any) -> np.ndarray:
    """The embedding [D] of a recording, of norm 1."""
    import librosa

    wav, _ = librosa.load(path, sr=RATE)
    wav = np.tile(wav, -(-_MIN_SAMPLES // len(wav)))
    level = np.sqrt(np.square(wav).mean())
    return encoder.embed_utterance(wav * max(1, _LEVEL / max(level, 1e-6)))


def voices_of(rows: Sequence[dict[str, Any]], left_out: int = -1) -> dict[str, np.ndarray]:
    """The voice [D] of each speaker: the mean of people's "embedding", without one row."""
    voices = {}
    for speaker in sorted({row["speaker"] for row in rows if row["who"] == PEOPLE}):
        own = [
            row["embedding"]
            for index, row in enumerate(rows)
            if row["who"] == PEOPLE and row["speaker"] == speaker and index != left_out
        ]
        mean = np.mean(own, axis=0)
        voices[speaker] = mean / np.linalg.norm(mean)
    return voices


def compare(rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """For each kind of speech: similarity to the voice asked for, to others, and if it is nearest.

    Args:
      rows: The rows of voices.jsonl, each with an "embedding" [D].

    Returns:
      Means [3] by "who".
    """
    results: dict[str, list[np.ndarray]] = {}
    for index, row in enumerate(rows):
        voices = voices_of(rows, index)
        asked = row.get("prompt") or row["speaker"]
        similarities = {name: float(row["embedding"] @ voice) for name, voice in voices.items()}
        others = [value for name, value in similarities.items() if name != asked]
        is_nearest = similarities[asked] > max(others)
        values = np.array([similarities[asked], np.mean(others), is_nearest])
        results.setdefault(row["who"], []).append(values)
    return {who: np.mean(values, axis=0) for who, values in results.items()}


def print_table(voices: Path) -> None:
    """Prints what `compare` finds in voices.jsonl."""
    rows = [row for _, row in read_json_lines(voices)]
    from resemblyzer import VoiceEncoder

    encoder = VoiceEncoder("cpu", verbose=False)
    for row in rows:
        row["embedding"] = embed(voices.parent / row["path"], encoder)
    print("| speech of | to the voice asked for | to the others | the nearest one |")
    print("|---|---|---|---|")
    for who, (asked, others, nearest) in compare(rows).items():
        print(f"| {who} | {asked:.3f} | {others:.3f} | {nearest:.2f} |")


def main(argv: Sequence[str] | None = None) -> int:
    """Compares voices; returns 2 after a user error."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("voices", type=Path, help="voices.jsonl of speech_study.py")
    args = parser.parse_args(argv)
    return exit_code(lambda: print_table(args.voices))


if __name__ == "__main__":
    sys.exit(main())
