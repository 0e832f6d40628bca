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
`words` also writes words.png, a plot, and words.html, a page to listen to.
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
from moss_tok.codec.inference import Codec, bucket_frames, encode_batch
from moss_tok.errors import exit_code
from moss_tok.json_files import read_json_lines
from moss_tok.speech import generate
from moss_tok.speech.sampling import DEFAULT

PEOPLE = "people"
RECORDINGS = "recordings"  # of people, not through the codec
TEMPLATES_PER_WORD = 1  # and speaker
HEADER = """\
| speech of | quantizers | WER | by templates | more words | fewer words | cut | seconds |
|---|---|---|---|---|---|---|---|"""
PAGE_TEXTS = 24
_BATCH = 25

# For each text: the words "heard", the "seconds", and whether the model "ended" the speech. With
# templates, also the words "matched".
Rows = list[dict[str, Any]]


class Setup(NamedTuple):
    """What is measured with.

    Attributes:
      codec: Of the codes of all speech models.
      recogniser: Reads codes.
      templates: Recordings of single words, with their "codes"; empty: not used.
      sampling: How models sample.
      tests: Recordings of people, with their "codes" and their audio "wav" [S].
      out: The folder of the results.
    """

    codec: Codec
    recogniser: language.Language
    templates: list[dict[str, Any]]
    sampling: speech.Sampling
    tests: list[dict[str, Any]]
    out: Path


def prepare(args: argparse.Namespace) -> Setup:
    """Loads the models, and encodes the recordings."""
    codec = moss_tok.load(args.recogniser)
    recogniser = language.load(args.recogniser)
    tests = with_codes(codec, read_recordings(args.test, args.seconds, args.number))
    templates = with_codes(codec, read_templates(args.templates)) if args.templates else []
    args.out.mkdir(parents=True, exist_ok=True)
    return Setup(codec, recogniser, templates, sampling_of(args), tests, args.out)


def with_codes(codec: Codec, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the "codes" of their "wav"."""
    codes = encode_all(codec, [row["wav"] for row in rows])
    return [row | {"codes": one} for row, one in zip(rows, codes, strict=True)]


def read_recordings(folder: Path, seconds: float, number: int) -> list[dict[str, Any]]:
    """The first recordings of a folder that are at most `seconds` long, with their audio."""
    recordings: list[dict[str, Any]] = []
    for _, row in read_json_lines(folder / "manifest.jsonl"):
        if len(recordings) < number and row["duration_s"] <= seconds:
            wav = files.read(folder / row["path"], digit_reader.RATE, 1)[0]
            recordings.append(row | {"wav": wav})
    return recordings


def read_templates(folder: Path) -> list[dict[str, Any]]:
    """The first recordings of each word and speaker."""
    counts: dict[tuple[str, str], int] = {}
    templates = []
    for row in read_recordings(folder, np.inf, 10**6):
        key = (row["speaker"], row["transcript"])
        if " " not in row["transcript"] and counts.get(key, 0) < TEMPLATES_PER_WORD:
            counts[key] = counts.get(key, 0) + 1
            templates.append(row)
    return templates


def template_reader(setup: Setup, number: int | None) -> digit_reader.Reader:
    """A reader that is used to the sound of a number of quantizers; None: to recordings."""
    wavs = [row["wav"] for row in setup.templates]
    if number is not None:
        codes = [row["codes"] for row in setup.templates]
        wavs = [wav[0] for wav in decode_all(setup.codec, codes, number)]
    trimmed = [librosa.effects.trim(wav, top_db=30)[0] for wav in wavs]
    words = [row["transcript"] for row in setup.templates]
    return digit_reader.Reader.of(list(zip(words, trimmed, strict=True)))


def encode_all(codec: Codec, wavs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Codes [Q, T] of recordings [S], with one program."""
    longest = codec.config.num_frames(max(len(wav) for wav in wavs))
    size = bucket_frames(longest, per_octave=2)
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


def read_all(
    setup: Setup, wavs: Sequence[np.ndarray], number: int | None, ended: Sequence[bool] = ()
) -> Rows:
    """What is heard in recordings [S] of a number of quantizers."""
    reader = template_reader(setup, number) if setup.templates else None
    codes = encode_all(setup.codec, wavs)
    options = {"sampling": language.Sampling(max_tokens=40)}
    heard = language.transcribe_codes(setup.codec, setup.recogniser, codes, **options)
    rows = []
    for wav, words, end in zip(wavs, heard, ended or [True] * len(wavs), strict=True):
        seconds = len(wav) / setup.codec.config.sample_rate
        row = {"heard": " ".join(words.split()), "seconds": seconds, "ended": end}
        if reader is not None:
            row["matched"] = reader.read(wav)
        rows.append(row)
    return rows


def write_audio(setup: Setup, name: str, wavs: Sequence[np.ndarray]) -> None:
    """Writes recordings [S] into a folder of OUT."""
    (setup.out / name).mkdir(exist_ok=True)
    for index, wav in enumerate(wavs):
        path = setup.out / name / f"{index:03}.wav"
        files.write(path, wav[None], setup.codec.config.sample_rate)


def speak(
    setup: Setup, model: speech.Speech, requests: Sequence[speech.Request], number: int, name: str
) -> Rows:
    """Speaks texts, writes the audio, and reads it."""
    spoken = generate.generate(model, requests, setup.sampling, num_quantizers=number)
    codes = [one.codes if one.codes.shape[1] else np.zeros((number, 1), int) for one in spoken]
    wavs = [wav[0] for wav in decode_all(setup.codec, codes, number)]
    write_audio(setup, name, wavs)
    return read_all(setup, wavs, number, [one.ended for one in spoken])


# --------------------------------------------------------------------------- words


def words(args: argparse.Namespace) -> None:
    """Prints the table of word error rates and of faults."""
    setup = prepare(args)
    texts = [row["transcript"] for row in setup.tests]
    print(f"{len(texts)} texts, {sum(len(text.split()) for text in texts)} words")
    print(HEADER)
    recorded = [row["wav"] for row in setup.tests]
    _row(setup, texts, RECORDINGS, "", lambda _: read_all(setup, recorded, None))
    models = {Path(path).name: speech.load(path) for path in args.checkpoint}
    requests = [speech.Request(text) for text in texts]
    rates: dict[str, list[tuple[int, float]]] = {}
    for number in args.quantizers:
        for who, model in {PEOPLE: None, **models}.items():

            def compute(name: str, model: Any = model, number: int = number) -> Rows:
                if model is None:
                    return people(setup, number, name)
                return speak(setup, model, requests, number, name)

            if model is None or number <= model.config.num_quantizers:
                rows = _row(setup, texts, who, number, compute)
                rates.setdefault(who, []).append((number, error_rate(texts, rows)))
    draw(rates, setup.out / "words.png")
    names = [f"{who}-{points[-1][0]}" for who, points in rates.items()]
    files.write_text(setup.out / "words.html", page(setup, texts, names))


def page(setup: Setup, texts: Sequence[str], names: Sequence[str]) -> str:
    """An HTML page to listen to the first texts: a column for each row of the table in `names`."""
    columns = [json.loads((setup.out / f"{name}.json").read_text()) for name in names]
    lines = ["<!doctype html><meta charset=utf-8><title>Spoken digits</title>"]
    lines.append("<h1>Spoken digits</h1><p>Below each recording: what the recogniser reads.")
    lines.append("<table cellpadding=6><tr align=left><th>text")
    lines += [f"<th>{name}" for name in names]
    for index, text in enumerate(texts[:PAGE_TEXTS]):
        lines.append(f"<tr><td>{text}")
        for name, rows in zip(names, columns, strict=True):
            source = f"{name}/{index:03}.wav"
            lines.append(f'<td><audio controls src="{source}"></audio><br>{rows[index]["heard"]}')
    return "\n".join([*lines, "</table>"]) + "\n"


def draw(rates: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Draws word error rates over numbers of quantizers, a line for each key."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for who, points in rates.items():
        style = {"color": "black", "linestyle": "--"} if who == PEOPLE else {}
        axes.plot(*zip(*points, strict=True), marker="o", label=who, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(NUMBERS, map(str, NUMBERS))
    axes.set_xlabel("quantizers")
    axes.set_ylabel("word error rate")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def people(setup: Setup, number: int, name: str) -> Rows:
    """What is heard in recordings of people, decoded from their codes."""
    codes = [row["codes"] for row in setup.tests]
    wavs = [wav[0] for wav in decode_all(setup.codec, codes, number)]
    write_audio(setup, name, wavs)
    return read_all(setup, wavs, number)


def _row(setup: Setup, texts: Sequence[str], who: str, number: int | str, compute: Any) -> Rows:
    """Computes the rows of one line of a table, unless OUT has them, and prints the line."""
    name = f"{who}-{number}" if number else who
    path = setup.out / f"{name}.json"
    if not path.exists():
        path.write_text(json.dumps(compute(name)))
    rows = json.loads(path.read_text())
    print(f"| {who} | {number} | {table_cells(texts, rows)} |", flush=True)
    return rows


def error_rate(texts: Sequence[str], rows: Rows, key: str = "heard") -> float:
    """The word error rate."""
    return jiwer.wer(list(texts), [row[key] for row in rows])


def table_cells(texts: Sequence[str], rows: Rows) -> str:
    """The cells of a line: error rates, shares of the texts, and the mean duration."""
    heard = [row["heard"] for row in rows]
    matched = ""
    if "matched" in rows[0]:
        matched = f"{error_rate(texts, rows, 'matched'):.3f}"
    num_heard = np.array([len(words.split()) for words in heard])
    num_written = np.array([len(text.split()) for text in texts])
    more = np.mean(num_heard > num_written)
    fewer = np.mean(num_heard < num_written)
    cut = np.mean([not row["ended"] for row in rows])
    seconds = np.mean([row["seconds"] for row in rows])
    rate = error_rate(texts, rows)
    return f"{rate:.3f} | {matched} | {more:.2f} | {fewer:.2f} | {cut:.2f} | {seconds:.2f}"


# --------------------------------------------------------------------------- voices


def voices(args: argparse.Namespace) -> None:
    """Speaks with and without prompts; prints word error rates and writes OUT/voices.jsonl."""
    setup = prepare(args)
    number = max(args.quantizers)
    people_wavs = decode_all(setup.codec, [row["codes"] for row in setup.tests], number)
    prompts = find_prompts(setup.tests)
    lines = []
    write_audio(setup, PEOPLE, [wav[0] for wav in people_wavs])
    for index, row in enumerate(setup.tests):
        lines.append({"path": f"{PEOPLE}/{index:03}.wav", "who": PEOPLE, "speaker": row["speaker"]})
    texts = [row["transcript"] for row in setup.tests]
    print(HEADER)
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
    study = {"words": words, "voices": voices}[args.study]
    return exit_code(lambda: study(args))


if __name__ == "__main__":
    sys.exit(main())
