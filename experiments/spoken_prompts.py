"""Makes recordings of one voice with texts: prompts of a telephone system, and numbers.

    apt-get download asterisk-core-sounds-en
    dpkg-deb -x asterisk-core-sounds-en_*.deb texts/
    TEXTS=texts/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz
    python experiments/spoken_prompts.py data/ $TEXTS OUT/

`data/` is the output of `data.py`; its recordings of asterisk-core-sounds-en-g722 are of one
speaker (Allison Smith, CC-BY-SA-3.0). OUT has two folders with a manifest.jsonl each:

  prompts  the recordings with a text of words, of at most `--seconds`
  numbers  numbers below 10000, and sequences of one to four digits, joined from recordings of the
           words: each word was recorded once, so recordings to learn from are up to 6 % faster or
           slower, with the pitch that this gives

Of the prompts, one text in twelve is in the split "test"; of the numbers, all multiples of seven.
OUT also has tokenizer.json (byte-pair encoding of the training texts).
"""

import argparse
import gzip
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import librosa
import numpy as np
from num2words import num2words
from spoken_digits import EDGE_SECONDS, join, manifest_line, trim, write_tokenizer
from tokenizers import decoders, pre_tokenizers

from moss_tok.audio import files
from moss_tok.cli.commands import Parser
from moss_tok.errors import exit_code
from moss_tok.json_files import read_json_lines

SOURCE = "asterisk-core-sounds-en-g722"
SPEAKER = "allison"
RATE = 16000  # of the recordings, Hz
PAUSE_SECONDS = (0.01, 0.06)
HELD_OUT = 12  # one prompt in this many is of the split "test"
TEST_DIVISOR = 7  # numbers that it divides are of the split "test"
MAX_DIGITS = 4
FASTEST = 1.06  # of the recorded speed; the slowest is its reciprocal
VOCABULARY = 400  # tokens

Rows = list[dict[str, Any]]


def normalize(text: str) -> str:
    """A text as lower-case words: digits are spelled, punctuation is left out."""
    text = re.sub(r"\d+", lambda digits: f" {spell(digits[0])} ", text.lower())
    return " ".join(re.sub(r"[^a-z' ]", " ", text).split())


def spell(digits: str) -> str:
    """The words of a number without leading zeros, or else of its digits."""
    if digits == "0" or not digits.startswith("0"):
        return " ".join(re.sub(r"[-,]| and\b", " ", num2words(int(digits))).split())
    return " ".join(num2words(int(digit)) for digit in digits)


def read_texts(path: Path) -> dict[str, str]:
    """Texts by the name of the recording; those of tones, in brackets, are left out.

    Raises:
      ValueError: The file is not a list of `NAME: TEXT`.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    texts = {}
    with opened(path, "rt") as lines:
        for line in lines:
            name, colon, text = line.partition(":")
            if colon and not line.startswith(";") and not re.search(r"[\[\]<>{}]", text):
                texts[name.strip()] = normalize(text)
    if not texts:
        raise ValueError(f"{path}: has no lines NAME: TEXT")
    return {name: text for name, text in texts.items() if text}


def read_recordings(data: Path, texts: dict[str, str]) -> Rows:
    """Rows of data.py's manifest that have a text, with their "transcript" and "name"."""
    manifest = data / "speech.jsonl"
    rows = []
    for _, row in read_json_lines(manifest):
        if row.get("source") == SOURCE:
            name = row["source_path"].split("/", 5)[-1].removesuffix(".g722")
            if name in texts and not name.startswith("silence/"):
                path = str((data / row["path"]).resolve())
                rows.append(row | {"path": path, "name": name, "transcript": texts[name]})
    if not rows:
        raise ValueError(f"{manifest}: has no recordings of {SOURCE} with a text")
    return rows


def prompts(rows: Rows, seconds: float) -> Rows:
    """The manifest of the prompts; the recordings stay where they are."""
    order = {text: index for index, text in enumerate(sorted({row["transcript"] for row in rows}))}
    return [
        manifest_line(
            row["path"], row["transcript"], SPEAKER, row["duration_s"],
            order[row["transcript"]] % HELD_OUT == 0,
        )
        for row in rows
        if row["duration_s"] <= seconds
    ]  # fmt: skip


def draw_number(random: np.random.Generator) -> tuple[int, str]:
    """A number of 1 to `MAX_DIGITS` digits and its words, or the words of its digits."""
    size = random.integers(1, MAX_DIGITS + 1)
    digits = "".join(str(digit) for digit in random.integers(10, size=size))
    if random.random() < 0.5:
        return int(digits), " ".join(spell(digit) for digit in digits)
    return int(digits), spell(str(int(digits)))


def read_words(rows: Rows, seconds: float) -> dict[str, list[np.ndarray]]:
    """The recording [S] of each word of numbers; ValueError if one lasts longer than `seconds`."""
    words = {
        row["transcript"]: [trim(files.read(Path(row["path"]), RATE, 1)[0], RATE)]
        for row in rows
        if row["name"].startswith("digits/")
    }
    longest = max(len(clip) for (clip,) in words.values()) / RATE + 2 * EDGE_SECONDS[1]
    if seconds < longest:
        raise ValueError(f"--seconds must be at least {longest:.2f}, the longest word")
    return words


def vary_speed(random: np.random.Generator, wav: np.ndarray, fastest: float) -> np.ndarray:
    """A recording [S] with a random speed between 1 / `fastest` and `fastest`."""
    speed = fastest ** random.uniform(-1, 1)
    return librosa.resample(wav, orig_sr=RATE * speed, target_sr=RATE)


def numbers(words: dict[str, list[np.ndarray]], folder: Path, count: int, seconds: float) -> Rows:
    """Writes recordings of random numbers; returns their manifest."""
    random = np.random.default_rng(0)
    lines: Rows = []
    while len(lines) < count:
        number, text = draw_number(random)
        is_test = number % TEST_DIVISOR == 0
        wav = join(random, text.split(), words, RATE, PAUSE_SECONDS)
        if not is_test:
            wav = vary_speed(random, wav, FASTEST)
        if len(wav) <= seconds * RATE:
            path = f"{len(lines):05}.flac"
            files.write(folder / path, wav[None], RATE)
            lines.append(manifest_line(path, text, SPEAKER, len(wav) / RATE, is_test))
    return lines


def make(args: argparse.Namespace) -> None:
    """Makes both folders and the tokenizer."""
    rows = read_recordings(args.data, read_texts(args.texts))
    words = read_words(rows, args.seconds)
    folders = {name: args.output / name for name in ("prompts", "numbers")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    manifests = {
        "prompts": prompts(rows, args.seconds),
        "numbers": numbers(words, folders["numbers"], args.number, args.seconds),
    }
    for name, lines in manifests.items():
        minutes = sum(line["duration_s"] for line in lines) / 60
        tests = sum(line["split"] == "test" for line in lines)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        files.write_text(folders[name] / "manifest.jsonl", text)
        print(f"{folders[name]}: {len(lines)} recordings, {minutes:.1f} min, {tests} for tests")
    train = [line for lines in manifests.values() for line in lines if line["split"] == "train"]
    texts = [line["transcript"] for line in train]
    write_tokenizer(
        args.output / "tokenizer.json", texts, VOCABULARY,
        pre_tokenizers.Metaspace(), decoders.Metaspace(),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the recordings; returns 2 after a user error."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="output of data.py")
    parser.add_argument("texts", type=Path, help="core-sounds-en.txt, also with .gz")
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--number", type=int, default=8000, help="recordings of numbers")
    parser.add_argument("--seconds", type=float, default=4.0, help="longest recording")
    args: argparse.Namespace = parser.parse_args(argv)
    return exit_code(lambda: make(args))


if __name__ == "__main__":
    sys.exit(main())
