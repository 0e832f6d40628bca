"""Makes recordings of digit sequences from recordings of single digits, for `speech.md`.

    python experiments/fsdd.py fsdd/recordings digits/
    python experiments/spoken_digits.py digits/ sequences/

The clips of the Free Spoken Digit Dataset (six speakers, ten digits, 50 clips of each), as listed
by `fsdd.py`, are joined to sequences of one to three digits of one speaker. OUT has three folders
of FLAC with a manifest.jsonl each, by the number at the end of a clip's name:

  speech  for a speech model: 6, 8, ... 48
  reader  for a recogniser: 5, 7, ... 49, which the speech model does not have
  test    0 to 4

`test` has two or three digits whose sum is a multiple of seven; `speech` has no such text. The
edges of a clip that are more than 35 dB below its loudest part are cut, and all clips get the same
loudness. There is silence of random length between two clips, and at both ends of a recording. In
`speech` and `reader`, one recording in forty is in the split "test". OUT also has tokenizer.json,
in which each word is a token. The same command makes the same files.
"""

import argparse
import collections
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from fsdd import PARTS, WORDS
from tokenizers import decoders, models, pre_tokenizers, trainers

from moss_tok.audio import files
from moss_tok.cli.commands import Parser
from moss_tok.errors import exit_code
from moss_tok.json_files import read_json_lines

RATE = 8000  # of the clips, Hz
LEVEL_DB = -22.0  # root mean square of a clip
QUIET_DB = 35.0  # a clip ends where it is this much below its loudest 10 ms
EDGE_SECONDS = (0.06, 0.14)
PAUSE_SECONDS = (0.04, 0.14)
DIGIT_SHARES = (0.35, 0.35, 0.3)  # of sequences of 1, 2, ... digits
TEST_SHARES = (0.0, 0.5, 0.5)
TEST_DIVISOR = 7  # of the sum of the digits of a test text
FIRST_NUMBER = 5  # of the clips to learn from
VOCABULARY = 100  # at most so many tokens
HELD_OUT = 40  # one recording in this many is of the split "test"

FOLDERS = ("speech", "reader", "test")

# Clips [S] by speaker and word.
Clips = dict[str, dict[str, list[np.ndarray]]]


def trim(wav: np.ndarray, rate: int = RATE) -> np.ndarray:
    """A clip [S] without its quiet edges, with 20 ms of them left, at `LEVEL_DB`."""
    size = rate // 100
    blocks = wav[: len(wav) // size * size].reshape(-1, size)
    power = np.square(blocks).mean(axis=1)
    (loud_blocks,) = np.nonzero(power > power.max() * 10 ** (-QUIET_DB / 10))
    first = max(0, loud_blocks[0] - 2)
    last = loud_blocks[-1] + 2
    wav = wav[first * size : (last + 1) * size]
    wav = wav - wav.mean()
    level = np.sqrt(np.square(wav).mean())
    return np.clip(wav * 10 ** (LEVEL_DB / 20) / level, -1, 1)


def folder_of(number: int) -> str:
    """The folder of a clip, by the number at the end of its name."""
    if number < FIRST_NUMBER:
        return "test"
    return "reader" if number % 2 else "speech"


def is_test_text(words: Sequence[str]) -> bool:
    """Whether a text is only in `test` and `reader`, not in `speech`."""
    return len(words) > 1 and sum(map(WORDS.index, words)) % TEST_DIVISOR == 0


def read_clips(digits: Path, rate: int = RATE) -> dict[str, Clips]:
    """The clips of each of the three folders, at a sample rate in Hz.

    Raises:
      ValueError: A manifest is not one of `fsdd.py`, or has no clips for one of the folders.
    """
    clips: dict[str, Clips] = {}
    for manifest in (digits / f"{part}.jsonl" for part in PARTS):
        for _, row in read_json_lines(manifest):
            path = Path(row["path"])
            number = path.stem.rsplit("_", 1)[-1]
            if not number.isdecimal():
                raise ValueError(f"{manifest}: {path.name} is not DIGIT_SPEAKER_NUMBER.wav")
            for key in ("speaker", "transcript"):
                if not row.get(key):
                    raise ValueError(f"{manifest}: {path.name} has no {key}")
            speakers = clips.setdefault(folder_of(int(number)), collections.defaultdict(dict))
            wav = files.read(manifest.parent / path, rate, 1)[0]
            speakers[row["speaker"]].setdefault(row["transcript"], []).append(trim(wav, rate))
    for folder in FOLDERS:
        if folder not in clips:
            raise ValueError(f"{digits}: has no recordings for {folder}")
        for speaker, words in clips[folder].items():
            missing = ", ".join(word for word in WORDS if word not in words)
            if missing:
                raise ValueError(f"{digits}: {speaker} has no recording for {folder} of {missing}")
    return clips


def silence(random: np.random.Generator, seconds: tuple[float, float], rate: int) -> np.ndarray:
    """Silence [S] of a random length."""
    return np.zeros(int(random.uniform(*seconds) * rate))


def draw_text(random: np.random.Generator, folder: str) -> list[str]:
    """Random digits, as words, for a folder."""
    shares = TEST_SHARES if folder == "test" else DIGIT_SHARES
    while True:
        number = 1 + random.choice(len(shares), p=shares)
        words = [WORDS[digit] for digit in random.integers(len(WORDS), size=number)]
        if folder == "reader" or is_test_text(words) == (folder == "test"):
            return words


def join(
    random: np.random.Generator,
    words: Sequence[str],
    clips: dict[str, list[np.ndarray]],
    rate: int = RATE,
    pause_seconds: tuple[float, float] = PAUSE_SECONDS,
) -> np.ndarray:
    """Audio [S] of words, from random clips of one speaker, with pauses between the words."""
    parts = [silence(random, EDGE_SECONDS, rate)]
    for index, word in enumerate(words):
        if index:
            parts.append(silence(random, pause_seconds, rate))
        parts.append(clips[word][random.integers(len(clips[word]))])
    parts.append(silence(random, EDGE_SECONDS, rate))
    return np.concatenate(parts)


def write(folder: Path, clips: Clips, number: int, seed: int) -> float:
    """Writes recordings and their manifest; returns their seconds."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    speakers = sorted(clips)
    lines = []
    total = 0.0
    for index in range(number):
        speaker = speakers[index % len(speakers)]
        words = draw_text(random, folder.name)
        wav = join(random, words, clips[speaker])
        path = folder / f"{index:05}.flac"
        files.write(path, wav[None], RATE)
        held_out = folder.name == "test" or index // len(speakers) % HELD_OUT == 0
        seconds = len(wav) / RATE
        line = manifest_line(path.name, " ".join(words), speaker, seconds, held_out)
        lines.append(json.dumps(line) + "\n")
        total += seconds
    files.write_text(folder / "manifest.jsonl", "".join(lines))
    return total


def manifest_line(
    path: str, text: str, speaker: str, seconds: float, is_test: bool
) -> dict[str, Any]:
    """A line of a manifest."""
    return {
        "path": path,
        "split": "test" if is_test else "train",
        "domain": "speech",
        "duration_s": seconds,
        "transcript": text,
        "speaker": speaker,
    }


def write_tokenizer(
    path: Path,
    texts: Iterable[str],
    vocab_size: int,
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    decoder: decoders.Decoder | None = None,
) -> None:
    """Writes a tokenizer (byte-pair encoding) of texts.

    Without a decoder, decoded tokens have spaces between them.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        tokenizer.decoder = decoder
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    files.write_text(path, tokenizer.to_str(pretty=True))


def make(args: argparse.Namespace) -> None:
    """Makes the three folders and the tokenizer."""
    clips = read_clips(args.digits)
    numbers = (args.number, args.number, args.test_number)
    for seed, (name, number) in enumerate(zip(FOLDERS, numbers, strict=True)):
        seconds = write(args.output / name, clips[name], number, seed)
        print(f"{args.output / name}: {number} recordings, {seconds / 60:.1f} min")
    texts = [*WORDS, *WORDS]  # a pair is merged if it occurs twice
    write_tokenizer(
        args.output / "tokenizer.json", texts, VOCABULARY, pre_tokenizers.WhitespaceSplit()
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the three folders; returns 2 after a user error."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("digits", type=Path, help="output of fsdd.py")
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--number", type=int, default=6000, help="recordings to learn from")
    parser.add_argument("--test-number", type=int, default=200)
    args: argparse.Namespace = parser.parse_args(argv)
    return exit_code(lambda: make(args))


if __name__ == "__main__":
    sys.exit(main())
