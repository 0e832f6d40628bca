"""Measures what speech models say: words, voices, endings. See `speech.md`.

    python experiments/speech_study.py words --recogniser=runs/reader --checkpoint=runs/half
    python experiments/speech_study.py voices --recogniser=runs/reader --checkpoint=runs/half

Both speak the texts of `--test`, a folder of `spoken_digits.py`, with all models, and read them
with a recogniser that was trained on codes. The models and the recogniser have the same codec.
Speech is decoded to audio and encoded again for the recogniser.

`words` prints the word error rate at each number of quantizers, beside that of the same texts
spoken by people (their codes, decoded). It also counts the texts that gained words, that lost
words, and that were cut at the longest duration. With `--templates`, the folder `reader` of
`spoken_digits.py`, `digit_reader.py` reads the words, too.

`voices` speaks each text without a prompt, with a prompt of the speaker of the recording, and with
a prompt of another speaker. `voice_similarity.py` compares the voices.

OUT gets the audio, and a .json file for each row of a table. What it has is not computed again.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import digit_reader
import jiwer
import librosa
import numpy as np
from codec_copies import NUMBERS, decode_all

import moss_tok
from moss_tok import language, speech
from moss_tok.audio import files
from moss_tok.batching import batch_by_shape
from moss_tok.cli.commands import Parser
from moss_tok.codec.inference import Codec, encode_batch
from moss_tok.json_files import read_json_lines
from moss_tok.speech import generate
from moss_tok.speech.sampling import DEFAULT

PEOPLE = "people"
RECORDINGS = "recordings"  # of people, not through the codec
TEMPLATES_PER_WORD = 2  # and speaker
_BATCH = 25

# For each text: the words "heard", the "seconds", and whether the model "ended" the speech. With
# templates, also the words "matched".
Rows = list[dict[str, Any]]


class Setup(NamedTuple):
    """What is measured with.

    Attributes:
      codec: Of the codes of all speech models.
      recogniser: Reads codes.
      templates: Reads audio at 24 kHz; None: not used.
      sampling: How models sample.
      tests: Recordings of people, with their "codes" and their audio "wav" [S].
      out: The folder of the results.
    """

    codec: Codec
    recogniser: language.Language
    templates: digit_reader.Reader | None
    sampling: speech.Sampling
    tests: list[dict[str, Any]]
    out: Path


def prepare(args: argparse.Namespace) -> Setup:
    """Loads the models, and encodes the recordings."""
    codec = moss_tok.load(args.recogniser)
    tests = read_recordings(args.test, args.seconds, args.number)
    for row, codes in zip(tests, encode_all(codec, [row["wav"] for row in tests]), strict=True):
        row["codes"] = codes
    templates = read_templates(args.templates) if args.templates else None
    args.out.mkdir(parents=True, exist_ok=True)
    recogniser = language.load(args.recogniser)
    return Setup(codec, recogniser, templates, sampling_of(args), tests, args.out)


def read_recordings(folder: Path, seconds: float, number: int) -> list[dict[str, Any]]:
    """The first recordings of a folder that are at most `seconds` long, with their audio."""
    recordings: list[dict[str, Any]] = []
    for _, row in read_json_lines(folder / "manifest.jsonl"):
        if len(recordings) < number and row["duration_s"] <= seconds:
            wav = files.read(folder / row["path"], digit_reader.RATE, 1)[0]
            recordings.append(row | {"wav": wav})
    return recordings


def read_templates(folder: Path) -> digit_reader.Reader:
    """A reader with the first recordings of each word and speaker."""
    counts: dict[tuple[str, str], int] = {}
    templates = []
    for row in read_recordings(folder, np.inf, 10**6):
        key = (row["speaker"], row["transcript"])
        if " " in row["transcript"] or counts.get(key, 0) == TEMPLATES_PER_WORD:
            continue
        counts[key] = counts.get(key, 0) + 1
        templates.append((row["transcript"], librosa.effects.trim(row["wav"], top_db=30)[0]))
    return digit_reader.Reader.of(templates)


def encode_all(codec: Codec, wavs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Codes [Q, T] of recordings [S], with one program."""
    size = codec.config.num_frames(max(len(wav) for wav in wavs))
    size = 50 * -(-size // 50)  # few lengths, because a program is compiled for each
    codes: list[np.ndarray] = []
    for _, rows, padded_rows in batch_by_shape([size] * len(wavs), _BATCH):
        batch = encode_batch(codec, [wavs[row][None] for row in padded_rows], num_frames=size)
        codes += batch[: len(rows)]
    return codes


def sampling_of(args: argparse.Namespace) -> speech.Sampling:
    """How models sample."""
    first = speech.Channel(args.first_temperature, repetition_penalty=args.repetition_penalty)
    others = dataclasses.replace(first, temperature=args.other_temperature)
    return dataclasses.replace(DEFAULT, first=first, others=others)


def read_all(setup: Setup, wavs: Sequence[np.ndarray], ended: Sequence[bool]) -> Rows:
    """What is heard in recordings [S]."""
    codes = encode_all(setup.codec, wavs)
    options = {"sampling": language.Sampling(max_tokens=40)}
    heard = language.transcribe_codes(setup.codec, setup.recogniser, codes, **options)
    rows = []
    for wav, words, end in zip(wavs, heard, ended, strict=True):
        seconds = len(wav) / setup.codec.config.sample_rate
        row = {"heard": " ".join(words.split()), "seconds": seconds, "ended": end}
        if setup.templates is not None:
            row["matched"] = setup.templates.read(wav)
        rows.append(row)
    return rows


def speak(
    setup: Setup, model: speech.Speech, requests: Sequence[speech.Request], number: int, name: str
) -> Rows:
    """Speaks texts, writes the audio, and reads it."""
    spoken = generate.generate(model, requests, setup.sampling, num_quantizers=number)
    codes = [one.codes if one.codes.shape[1] else np.zeros((number, 1), int) for one in spoken]
    wavs = [wav[0] for wav in decode_all(setup.codec, codes, number)]
    folder = setup.out / name
    folder.mkdir(exist_ok=True)
    for index, wav in enumerate(wavs):
        files.write(folder / f"{index:03}.wav", wav[None], setup.codec.config.sample_rate)
    return read_all(setup, wavs, [one.ended for one in spoken])


# --------------------------------------------------------------------------- words


def words(args: argparse.Namespace) -> None:
    """Prints the table of word error rates and of faults."""
    setup = prepare(args)
    texts = [row["transcript"] for row in setup.tests]
    print(f"{len(texts)} texts, {sum(len(text.split()) for text in texts)} words")
    print("| speech of | quantizers | WER | by templates | more words | fewer words | cut | "
          "seconds |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    recorded = [row["wav"] for row in setup.tests]
    _row(setup, texts, RECORDINGS, "", lambda _: read_all(setup, recorded, [True] * len(texts)))
    models = {Path(path).name: speech.load(path) for path in args.checkpoint}
    requests = [speech.Request(text) for text in texts]
    for number in args.quantizers:
        _row(setup, texts, PEOPLE, number, lambda _, n=number: people(setup, n))
        for model_name, model in models.items():
            if number <= model.config.num_quantizers:
                compute = lambda name, m=model, n=number: speak(setup, m, requests, n, name)  # noqa: E731
                _row(setup, texts, model_name, number, compute)


def people(setup: Setup, number: int) -> Rows:
    """What is heard in recordings of people, decoded from their codes."""
    codes = [row["codes"] for row in setup.tests]
    wavs = [wav[0] for wav in decode_all(setup.codec, codes, number)]
    return read_all(setup, wavs, [True] * len(wavs))


def _row(setup: Setup, texts: Sequence[str], who: str, number: int | str, compute: Any) -> Rows:
    """Computes the rows of one line of a table, unless OUT has them, and prints the line."""
    name = f"{who}-{number}" if number else who
    path = setup.out / f"{name}.json"
    if not path.exists():
        path.write_text(json.dumps(compute(name)))
    rows = json.loads(path.read_text())
    print(f"| {who} | {number} | {table_cells(texts, rows)} |", flush=True)
    return rows


def table_cells(texts: Sequence[str], rows: Rows) -> str:
    """The cells of a line: error rates, shares of the texts, and the mean duration."""
    heard = [row["heard"] for row in rows]
    matched = ""
    if "matched" in rows[0]:
        matched = f"{jiwer.wer(list(texts), [row['matched'] for row in rows]):.3f}"
    num_heard = np.array([len(words.split()) for words in heard])
    num_written = np.array([len(text.split()) for text in texts])
    more = np.mean(num_heard > num_written)
    fewer = np.mean(num_heard < num_written)
    cut = np.mean([not row["ended"] for row in rows])
    seconds = np.mean([row["seconds"] for row in rows])
    rate = jiwer.wer(list(texts), heard)
    return f"{rate:.3f} | {matched} | {more:.2f} | {fewer:.2f} | {cut:.2f} | {seconds:.2f}"


# --------------------------------------------------------------------------- voices


def voices(args: argparse.Namespace) -> None:
    """Speaks with and without prompts; prints word error rates and writes OUT/voices.jsonl."""
    setup = prepare(args)
    number = max(args.quantizers)
    people_wavs = decode_all(setup.codec, [row["codes"] for row in setup.tests], number)
    prompts = find_prompts(setup.tests)
    lines = []
    (setup.out / PEOPLE).mkdir(exist_ok=True)
    for index, (row, wav) in enumerate(zip(setup.tests, people_wavs, strict=True)):
        path = f"{PEOPLE}/{index:03}.wav"
        files.write(setup.out / path, wav, setup.codec.config.sample_rate)
        lines.append({"path": path, "who": PEOPLE, "speaker": row["speaker"]})
    texts = [row["transcript"] for row in setup.tests]
    for checkpoint in args.checkpoint:
        model = speech.load(checkpoint)
        for prompt, chosen in prompts.items():
            who = f"{Path(checkpoint).name}-{prompt}"
            requests = [_request(text, row) for text, row in zip(texts, chosen, strict=True)]
            _row(
                setup, texts, who, number,
                lambda name, r=requests, m=model: speak(setup, m, r, number, name),
            )  # fmt: skip
            for index, (own, row) in enumerate(zip(setup.tests, chosen, strict=True)):
                lines.append({
                    "path": f"{who}-{number}/{index:03}.wav", "who": who, "speaker": own["speaker"],
                    "prompt": row and row["speaker"],
                })  # fmt: skip
    files.write_text(setup.out / "voices.jsonl", "".join(json.dumps(x) + "\n" for x in lines))


def find_prompts(
    tests: Sequence[dict[str, Any]],
) -> dict[str, list[dict[str, Any] | None]]:
    """For each kind of prompt, a recording for each test: of another text, or None."""
    same: list[dict[str, Any] | None] = []
    other: list[dict[str, Any] | None] = []
    speakers = sorted({row["speaker"] for row in tests})
    for index, row in enumerate(tests):
        next_speaker = speakers[(speakers.index(row["speaker"]) + 1) % len(speakers)]
        for chosen, speaker in ((same, row["speaker"]), (other, next_speaker)):
            ordered = [*tests[index + 1 :], *tests[:index]]
            chosen.append(next(
                x for x in ordered
                if x["speaker"] == speaker and x["transcript"] != row["transcript"]
            ))  # fmt: skip
    return {"none": [None] * len(tests), "same": same, "other": other}


def _request(text: str, prompt: dict[str, Any] | None) -> speech.Request:
    if prompt is None:
        return speech.Request(text)
    return speech.Request(text, prompt["codes"], prompt["transcript"])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a study; returns 2 after a user error."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=("words", "voices"))
    parser.add_argument(
        "--checkpoint", action="append", default=[], help="speech model; repeat for several"
    )
    parser.add_argument("--recogniser", required=True, help="codec with a language model")
    parser.add_argument("--test", type=Path, default=Path("sequences/test"))
    parser.add_argument("--templates", type=Path, help="folder of single words for digit_reader.py")
    parser.add_argument("--out", type=Path, default=Path("study"))
    parser.add_argument("--quantizers", type=int, nargs="+", default=NUMBERS)
    parser.add_argument("--first-temperature", type=float, default=DEFAULT.first.temperature)
    parser.add_argument("--other-temperature", type=float, default=DEFAULT.others.temperature)
    penalty = DEFAULT.first.repetition_penalty
    parser.add_argument("--repetition-penalty", type=float, default=penalty)
    parser.add_argument("--number", type=int, default=100, help="largest number of texts")
    parser.add_argument("--seconds", type=float, default=2.0, help="longest recording of people")
    args = parser.parse_args(argv)
    try:
        {"words": words, "voices": voices}[args.study](args)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
