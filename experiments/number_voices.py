"""Makes recordings of numbers by many voices, for a recogniser of `spoken_prompts.py`'s numbers.

    apt-get install flite espeak-ng festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts
    python experiments/fsdd.py fsdd/recordings digits/
    python experiments/number_voices.py digits/ OUT/

The texts are drawn as those of spoken_prompts.py. Synthesizers speak each word of them: flite (four
voices), festival (three), and espeak-ng (eight accents, each with five variants of the voice).
Digits are also spoken by the six people of the Free Spoken Digit Dataset, of which fsdd.py made the
lists. A recording joins words of one speaker, as fast as recorded or up to 18 % faster or slower,
with the pitch that this gives.

OUT has FLAC files and a manifest.jsonl. One recording in forty is in the split "test". The same
command with the same synthesizers makes the same files.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fsdd import WORDS as DIGITS
from num2words import num2words
from spoken_digits import HELD_OUT, join, manifest_line, read_clips, trim
from spoken_prompts import PAUSE_SECONDS, RATE, draw_number, vary_speed

from moss_tok.audio import files
from moss_tok.cli.commands import Parser
from moss_tok.errors import exit_code

WORDS = (
    *map(num2words, range(20)),
    *map(num2words, range(20, 100, 10)),
    "hundred",
    "thousand",
)
FLITE = ("kal16", "awb", "rms", "slt")
FESTIVAL = ("kal_diphone", "ked_diphone", "cmu_us_slt_arctic_hts")
STRETCHES = (0.85, 1.0, 1.2)  # of durations
ACCENTS = (
    "en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029",
    "en-us-nyc",
)  # fmt: skip
VARIANTS = (
    "f1", "f2", "f3", "f4", "f5", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "Andy", "Annie",
    "Michael", "Alicia", "linda", "steph", "belinda", "Denis",
)  # fmt: skip
VARIANTS_OF_AN_ACCENT = 5
WORDS_PER_MINUTE = (140, 165, 190)  # espeak-ng
FASTEST = 1.18  # of the recorded speed; the slowest is its reciprocal
ESPEAK_SHARE = 0.4  # of the recordings of synthesizers
PEOPLE_SHARE = 0.6  # of the recordings whose words are all digits

# Recordings [S] by word.
Words = dict[str, list[np.ndarray]]


class Voice(NamedTuple):
    """A synthesizer with its settings.

    Attributes:
      name: The speaker in the manifest.
      command: Reads the file "TEXT" and writes the file "WAV".
    """

    name: str
    command: tuple[str, ...]


def natural_voices() -> Iterator[Voice]:
    """Synthesizers that were made from recordings of people."""
    for name, stretch in itertools.product(FLITE, STRETCHES):
        options = ("--setf", f"duration_stretch={stretch}", "-f", "TEXT", "-o", "WAV")
        yield Voice(f"{name}-{stretch}", ("flite", "-voice", name, *options))
    for name, stretch in itertools.product(FESTIVAL, STRETCHES):
        settings = f"(begin (voice_{name}) (Parameter.set 'Duration_Stretch {stretch}))"
        yield Voice(f"{name}-{stretch}", ("text2wave", "-eval", settings, "TEXT", "-o", "WAV"))


def formant_voices() -> Iterator[Voice]:
    """Voices of espeak-ng."""
    variants = itertools.cycle(VARIANTS)
    for accent in ACCENTS:
        for variant in itertools.islice(variants, VARIANTS_OF_AN_ACCENT):
            name = f"{accent}+{variant}"
            speed = str(WORDS_PER_MINUTE[len(name) % len(WORDS_PER_MINUTE)])
            yield Voice(name, ("espeak-ng", "-v", name, "-s", speed, "-f", "TEXT", "-w", "WAV"))


def synthesize(voice: Voice, folder: Path) -> Words:
    """All words, spoken by a voice.

    Raises:
      ValueError: The synthesizer fails.
    """
    paths = {"TEXT": str(folder / "word.txt"), "WAV": str(folder / "word.wav")}
    command = [paths.get(part, part) for part in voice.command]
    clips = {}
    for word in WORDS:
        Path(paths["TEXT"]).write_text(word)
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            raise ValueError(f"{' '.join(command)}: {run.stderr.strip() or 'failed'}")
        clips[word] = [trim(files.read(Path(paths["WAV"]), RATE, 1)[0], RATE)]
    return clips


def synthesize_all(voices: Sequence[Voice]) -> dict[str, Words]:
    """The words of all voices, by the name of the voice; prints progress."""
    speakers = {}
    with tempfile.TemporaryDirectory() as folder:
        for index, voice in enumerate(voices, start=1):
            speakers[voice.name] = synthesize(voice, Path(folder))
            print(f"{voice.name}: {index} of {len(voices)} voices", flush=True)
    return speakers


def read_people(digits: Path) -> dict[str, Words]:
    """The recordings of digits by people, by speaker, without those for tests."""
    people: dict[str, Words] = {}
    for folder, clips in read_clips(digits, RATE).items():
        if folder != "test":
            for speaker, recordings in clips.items():
                words = people.setdefault(speaker, {})
                for word, wavs in recordings.items():
                    words.setdefault(word, []).extend(wavs)
    return people


def draw(
    random: np.random.Generator,
    people: dict[str, Words],
    natural: dict[str, Words],
    formant: dict[str, Words],
) -> tuple[str, str, np.ndarray]:
    """A text, who speaks it, and the recording [S]."""
    _, text = draw_number(random)
    words = text.split()
    is_digits = set(words) <= set(DIGITS)
    if is_digits and random.random() < PEOPLE_SHARE:
        speakers = people
    else:
        speakers = formant if random.random() < ESPEAK_SHARE else natural
    name = random.choice(sorted(speakers))
    wav = join(random, words, speakers[name], RATE, PAUSE_SECONDS)
    return text, str(name), vary_speed(random, wav, FASTEST)


def make(args: argparse.Namespace) -> None:
    """Writes the recordings and the manifest."""
    people = read_people(args.digits)
    natural = synthesize_all(list(natural_voices()))
    formant = synthesize_all(list(formant_voices()))
    args.output.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    lines: list[str] = []
    total = 0.0
    while len(lines) < args.number:
        text, speaker, wav = draw(random, people, natural, formant)
        seconds = len(wav) / RATE
        if seconds <= args.seconds:
            path = f"{len(lines):05}.flac"
            files.write(args.output / path, wav[None], RATE)
            is_test = len(lines) % HELD_OUT == 0
            line = manifest_line(path, text, speaker, seconds, is_test)
            lines.append(json.dumps(line) + "\n")
            total += seconds
    files.write_text(args.output / "manifest.jsonl", "".join(lines))
    print(f"{args.output}: {len(lines)} recordings, {total / 60:.1f} min")


def check_synthesizers() -> None:
    """Raises ValueError if one is not installed."""
    missing = [name for name in ("flite", "text2wave", "espeak-ng") if not shutil.which(name)]
    if missing:
        raise ValueError(f"not installed: {', '.join(missing)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the recordings; returns 2 after a user error."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("digits", type=Path, help="output of fsdd.py")
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--number", type=int, default=8000, help="recordings")
    parser.add_argument("--seconds", type=float, default=4.0, help="longest recording")
    args: argparse.Namespace = parser.parse_args(argv)

    def run() -> None:
        check_synthesizers()
        make(args)

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
