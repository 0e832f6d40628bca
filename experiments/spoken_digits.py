"""Makes recordings of digit sequences from recordings of single digits, for `speech.md`.

    python experiments/spoken_digits.py corpus/manifest.jsonl digits/

The corpus's clips of the Free Spoken Digit Dataset (five speakers, ten digits, 20 clips of each for
training and one for the test) are joined to sequences of one to five digits of one speaker. OUT has
three folders of FLAC with a manifest.jsonl each:

  speech  for a speech model: the clips with an even number
  reader  for a recogniser: the clips with an odd number, which the speech model does not have
  test    from the test clips

The edges of a clip that are more than 35 dB below its loudest part are cut, and all clips get the
same loudness. There is silence of random length between two clips, and at both ends of a recording.
In `speech` and `reader`, one recording in forty is in the split "test". The same command makes the
same files.
"""

import argparse
import collections
import json
from pathlib import Path

import numpy as np

from moss_tok.audio import files
from moss_tok.cli.commands import Parser
from moss_tok.json_files import read_json_lines

RATE = 8000  # of the clips, Hz
LEVEL_DB = -22.0  # root mean square of a clip
QUIET_DB = 35.0  # a clip ends where it is this much below its loudest 10 ms
EDGE_SECONDS = (0.06, 0.14)
PAUSE_SECONDS = (0.04, 0.14)
DIGIT_SHARES = (0.3, 0.25, 0.2, 0.15, 0.1)  # of sequences of 1, 2, ... digits
HELD_OUT = 40  # one recording in this many is of the split "test"

# Clips [S] by speaker and word.
Clips = dict[str, dict[str, list[np.ndarray]]]


def trim(wav: np.ndarray) -> np.ndarray:
    """A clip [S] without its quiet edges, with 20 ms of them left, at `LEVEL_DB`."""
    size = RATE // 100
    blocks = wav[: len(wav) // size * size].reshape(-1, size)
    power = np.square(blocks).mean(axis=1)
    (loud_blocks,) = np.nonzero(power > power.max() * 10 ** (-QUIET_DB / 10))
    first = max(0, loud_blocks[0] - 2)
    last = loud_blocks[-1] + 2
    wav = wav[first * size : (last + 1) * size]
    wav = wav - wav.mean()
    level = np.sqrt(np.square(wav).mean())
    return np.clip(wav * 10 ** (LEVEL_DB / 20) / level, -1, 1)


def read_clips(corpus: Path) -> dict[str, Clips]:
    """The clips of each of the three folders; ValueError if the corpus has none."""
    clips: dict[str, Clips] = {}
    for _, row in read_json_lines(corpus):
        if row.get("subset") != "fsdd":
            continue
        folder = "test"
        if row["split"] == "train":
            number = int(Path(row["path"]).stem.rsplit("-", 1)[1])
            folder = "reader" if number % 2 else "speech"
        wav = files.read(corpus.parent / row["path"], RATE, 1)[0]
        speakers = clips.setdefault(folder, collections.defaultdict(dict))
        words = speakers[row["speaker"]]
        words.setdefault(row["transcript"].lower(), []).append(trim(wav))
    if len(clips) < 3:
        raise ValueError(f"{corpus}: has no clips of the subset 'fsdd' in both splits")
    return clips


def silence(random: np.random.Generator, seconds: tuple[float, float]) -> np.ndarray:
    """Silence [S] of a random length."""
    return np.zeros(int(random.uniform(*seconds) * RATE))


def join(random: np.random.Generator, words: dict[str, list[np.ndarray]]) -> tuple[str, np.ndarray]:
    """A sequence of random digits, and its audio [S]."""
    number = 1 + random.choice(len(DIGIT_SHARES), p=DIGIT_SHARES)
    chosen = random.choice(sorted(words), number)
    parts = [silence(random, EDGE_SECONDS)]
    for index, word in enumerate(chosen):
        if index:
            parts.append(silence(random, PAUSE_SECONDS))
        parts.append(words[word][random.integers(len(words[word]))])
    parts.append(silence(random, EDGE_SECONDS))
    return " ".join(chosen), np.concatenate(parts)


def write(folder: Path, clips: Clips, number: int, seed: int) -> float:
    """Writes recordings and their manifest; returns their seconds."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    speakers = sorted(clips)
    lines = []
    total = 0.0
    for index in range(number):
        speaker = speakers[index % len(speakers)]
        text, wav = join(random, clips[speaker])
        path = folder / f"{index:05}.flac"
        files.write(path, wav[None], RATE)
        held_out = folder.name == "test" or index // len(speakers) % HELD_OUT == 0
        total += len(wav) / RATE
        line = {
            "path": path.name,
            "split": "test" if held_out else "train",
            "domain": "speech",
            "duration_s": len(wav) / RATE,
            "transcript": text,
            "speaker": speaker,
        }
        lines.append(json.dumps(line) + "\n")
    files.write_text(folder / "manifest.jsonl", "".join(lines))
    return total


def main() -> None:
    """Makes the three folders."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path, help="manifest.jsonl of the corpus")
    parser.add_argument("output", type=Path)
    parser.add_argument("--number", type=int, default=3000, help="recordings to learn from")
    parser.add_argument("--test-number", type=int, default=200)
    args: argparse.Namespace = parser.parse_args()
    clips = read_clips(args.corpus)
    numbers = {"speech": args.number, "reader": args.number, "test": args.test_number}
    for seed, (name, number) in enumerate(numbers.items()):
        seconds = write(args.output / name, clips[name], number, seed)
        print(f"{args.output / name}: {number} recordings, {seconds / 60:.1f} min")


if __name__ == "__main__":
    main()
