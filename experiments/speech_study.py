"""Measures what speech models say: words, voices, endings. See `speech.md`.

    python experiments/speech_study.py words --recogniser=runs/reader --checkpoint=runs/half
    python experiments/speech_study.py voices --recogniser=runs/reader --checkpoint=runs/half
    python experiments/speech_study.py words --codec=CODEC --checkpoint=RUN --test=out/prompts

All speak the texts of `--test`, a folder of `spoken_digits.py` or `spoken_prompts.py`, with all
models. A recogniser of the project reads them, which was trained on codes of the same codec: speech
is decoded to audio and encoded again for it. Without one, PocketSphinx reads the audio.

`words` prints the word error rate at each number of quantizers, beside that of the same texts
spoken by people (their codes, decoded). It also counts the texts that gained words, that lost
words, and that were cut at the longest duration.

`voices` speaks each text without a prompt, with a prompt of the speaker of the recording, and with
a prompt of another speaker. `voice_similarity.py` compares the voices.

OUT has the layout of `moss-tok evaluate`: OUT/MODEL/qN/TEST/texts.jsonl for each row of a table,
the audio beside it, and the word error rate in results.json. So `moss-tok report OUT` writes a page
to listen to; the command does so at its end. What OUT has is not computed again. `words` also
writes words.png, a plot.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jiwer
import numpy as np
import sphinx_reader
from codec_copies import NUMBERS, decode_all

import moss_tok
from moss_tok import checkpoint, language, speech
from moss_tok.audio import files
from moss_tok.batching import batch_by_shape
from moss_tok.cli.commands import Parser
from moss_tok.codec.inference import Codec, bucket_frames, encode_batch
from moss_tok.errors import exit_code
from moss_tok.evaluation import pages
from moss_tok.json_files import read_json_lines, read_json_object
from moss_tok.speech import generate
from moss_tok.speech.sampling import DEFAULT

PEOPLE = "people"
RECORDINGS = "recordings"  # of people, not through the codec
HEADER = """\
| speech of | quantizers | WER | more words | fewer words | cut | seconds |
|---|---|---|---|---|---|---|"""
_BATCH = 25
_SETTINGS_FILE = "settings.json"
# The arguments that all results in OUT have in common.
_SETTINGS = (
    "study", "codec", "recogniser", "only_test_words", "test", "split", "number", "seconds",
    "first_temperature", "other_temperature", "repetition_penalty",
)  # fmt: skip

# For each text: the words that were "understood", the "seconds", and whether the model "ended" the
# speech. With the "name" of the audio and the "text", a line of texts.jsonl.
Rows = list[dict[str, Any]]


class Setup(NamedTuple):
    """What is measured with.

    Attributes:
      codec: Of the codes of all speech models.
      read: The words in each of several recordings [S], at the rate of the codec.
      sampling: How models sample.
      tests: Recordings of people, with their "codes", their audio "wav" [S], and the "name" of
        their file in the results.
      out: The folder of the results.
      dataset: Name of the tests in the results.
    """

    codec: Codec
    read: Callable[[Sequence[np.ndarray]], list[str]]
    sampling: speech.Sampling
    tests: list[dict[str, Any]]
    out: Path
    dataset: str

    def folder(self, system: str) -> Path:
        """The audio and the texts of a system, such as "MODEL/q8"."""
        return self.out / system / self.dataset


def prepare(args: argparse.Namespace) -> Setup:
    """Loads the models, and encodes the recordings.

    Raises:
      ValueError: There is neither a codec nor a recogniser, or nothing to speak; or as
        `check_settings`.
    """
    if not (args.codec or args.recogniser):
        raise ValueError("needs --codec or --recogniser")
    check_settings(args)
    codec = moss_tok.load(args.codec or args.recogniser)
    tests = read_recordings(args, codec.config.sample_rate)
    if not tests:
        raise ValueError(f"{args.test}: has no test recordings of at most {args.seconds} s")
    read = find_reader(args, codec, tests)
    codes = encode_all(codec, [row["wav"] for row in tests])
    for index, row in enumerate(tests):
        words = row["transcript"].replace(" ", "_")
        row |= {"codes": codes[index], "name": f"{index:03}_{words[:60]}.flac"}
    return Setup(codec, read, sampling_of(args), tests, args.out, args.test.name)


def settings_of(args: argparse.Namespace) -> dict[str, str]:
    """What all results in OUT have in common; of the recogniser, its newest checkpoint."""
    settings = {name: str(value) for name, value in vars(args).items() if name in _SETTINGS}
    if args.recogniser:
        settings["recogniser"] = str(checkpoint.find_checkpoint(args.recogniser))
    return settings


def models_of(args: argparse.Namespace) -> dict[str, str]:
    """The checkpoint of each speech model, by "model NAME".

    Raises:
      ValueError: Two models have the same name.
    """
    names = [Path(path).name for path in args.checkpoint]
    if len(set(names)) < len(names):
        raise ValueError(f"two models of --checkpoint have the same name: {', '.join(names)}")
    folders = [str(checkpoint.find_checkpoint(path)) for path in args.checkpoint]
    return {f"model {name}": folder for name, folder in zip(names, folders, strict=True)}


def check_settings(args: argparse.Namespace) -> None:
    """Raises ValueError if OUT has results of other settings, or of another model of a name."""
    before = read_settings(args)
    now = settings_of(args) | models_of(args)
    changed = [name for name, value in now.items() if before.get(name, value) != value]
    if changed:
        raise ValueError(f"{args.out} has results of another {', '.join(changed)}")


def read_settings(args: argparse.Namespace) -> dict[str, str]:
    """The settings and the models of the results in OUT, if it has any."""
    path = args.out / _SETTINGS_FILE
    return read_json_object(path) if path.exists() else {}


def begin(args: argparse.Namespace) -> None:
    """Makes OUT with the settings, when all inputs have been read, and prints the table's head."""
    settings = read_settings(args) | settings_of(args) | models_of(args)
    args.out.mkdir(parents=True, exist_ok=True)
    files.write_text(args.out / _SETTINGS_FILE, json.dumps(settings) + "\n")
    print(HEADER)


def find_reader(
    args: argparse.Namespace, codec: Codec, tests: list[dict[str, Any]]
) -> Callable[[Sequence[np.ndarray]], list[str]]:
    """The recogniser of the project, or else PocketSphinx."""
    if args.recogniser:
        recogniser = language.load(args.recogniser)
        options = language.Sampling(max_tokens=40)
        return lambda wavs: language.transcribe_codes(
            codec, recogniser, encode_all(codec, wavs), sampling=options
        )
    words = [word for row in tests for word in row["transcript"].split()]
    reader = sphinx_reader.Reader(words if args.only_test_words else ())
    return lambda wavs: reader.read_all(wavs, codec.config.sample_rate)


def read_recordings(args: argparse.Namespace, rate: int) -> list[dict[str, Any]]:
    """The first recordings of the split that are short enough, with their audio."""
    recordings: list[dict[str, Any]] = []
    for _, row in read_json_lines(args.test / "manifest.jsonl"):
        is_short = row["duration_s"] <= args.seconds
        if len(recordings) < args.number and is_short and row["split"] == args.split:
            wav = files.read(args.test / row["path"], rate, 1)[0]
            recordings.append(row | {"wav": wav})
    return recordings


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


def read_all(setup: Setup, wavs: Sequence[np.ndarray], ended: Sequence[bool] = ()) -> Rows:
    """What is understood in recordings [S]."""
    rows = []
    for wav, text, end in zip(wavs, setup.read(wavs), ended or [True] * len(wavs), strict=True):
        seconds = len(wav) / setup.codec.config.sample_rate
        rows.append({"understood": " ".join(text.split()), "seconds": seconds, "ended": end})
    return rows


def write_audio(setup: Setup, system: str, wavs: Sequence[np.ndarray]) -> None:
    """Writes recordings [S] of a system, and beside them those of people."""
    folder = setup.folder(system)
    for row, wav in zip(setup.tests, wavs, strict=True):
        for kind, one in (("gt_audios", row["wav"]), ("syn_audios", wav)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            files.write(folder / kind / row["name"], one[None], setup.codec.config.sample_rate)
    names = [row["name"] for row in setup.tests]
    manifest = {"dataset": {"name": setup.dataset, "output_names": names}}
    files.write_text(folder / "manifest.json", json.dumps(manifest))


def speak(
    setup: Setup, model: speech.Speech, requests: Sequence[speech.Request], number: int, system: str
) -> Rows:
    """Speaks texts, writes the audio, and reads it."""
    spoken = generate.generate(model, requests, setup.sampling, num_quantizers=number)
    codes = [one.codes if one.codes.shape[1] else np.zeros((number, 1), int) for one in spoken]
    wavs = [wav[0] for wav in decode_all(setup.codec, codes, number)]
    write_audio(setup, system, wavs)
    return read_all(setup, wavs, [one.ended for one in spoken])


# --------------------------------------------------------------------------- words


def words(args: argparse.Namespace) -> None:
    """Prints the table of word error rates and of faults."""
    setup = prepare(args)
    texts = [row["transcript"] for row in setup.tests]
    print(f"{len(texts)} texts, {sum(len(text.split()) for text in texts)} words")
    models = {Path(path).name: speech.load(path) for path in args.checkpoint}
    begin(args)
    recorded = [row["wav"] for row in setup.tests]
    _row(setup, RECORDINGS, None, lambda _: read_all(setup, recorded))
    requests = [speech.Request(text) for text in texts]
    rates: dict[str, list[tuple[int, float]]] = {}
    for number in args.quantizers:
        for who, model in {PEOPLE: None, **models}.items():

            def compute(system: str, model: Any = model, number: int = number) -> Rows:
                if model is None:
                    return people(setup, number, system)
                return speak(setup, model, requests, number, system)

            if model is None or number <= model.config.num_quantizers:
                rate = _row(setup, who, number, compute)
                rates.setdefault(who, []).append((number, rate))
    draw(rates, setup.out / "words.png")
    print(pages.write_evaluation(setup.out))


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


def people(setup: Setup, number: int, system: str) -> Rows:
    """What is understood in recordings of people, decoded from their codes."""
    codes = [row["codes"] for row in setup.tests]
    wavs = [wav[0] for wav in decode_all(setup.codec, codes, number)]
    write_audio(setup, system, wavs)
    return read_all(setup, wavs)


def _row(setup: Setup, who: str, number: int | None, compute: Callable[[str], Rows]) -> float:
    """Computes one line of a table, unless OUT has it; prints it, and returns the error rate."""
    system = f"{who}/q{number}" if number else who
    path = setup.folder(system) / "texts.jsonl"
    if not path.exists():
        lines = []
        for test, row in zip(setup.tests, compute(system), strict=True):
            line = {"name": test["name"], "text": test["transcript"]} | row
            lines.append(json.dumps(line) + "\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, "".join(lines))
    rows = [row for _, row in read_json_lines(path)]
    print(f"| {who} | {number or ''} | {table_cells(rows)} |", flush=True)
    rate = error_rate(rows)
    results: dict[str, Any] = {setup.dataset: {"wer": rate}}
    if number:
        results["_meta"] = {"bps": round(setup.codec.config.bitrate(number))}
    files.write_text(setup.out / system / "results.json", json.dumps(results))
    return rate


def error_rate(rows: Rows) -> float:
    """The word error rate."""
    return jiwer.wer([row["text"] for row in rows], [row["understood"] for row in rows])


def table_cells(rows: Rows) -> str:
    """The cells of a line: error rates, shares of the texts, and the mean duration."""
    num_understood = np.array([len(row["understood"].split()) for row in rows])
    num_written = np.array([len(row["text"].split()) for row in rows])
    more = np.mean(num_understood > num_written)
    fewer = np.mean(num_understood < num_written)
    cut = np.mean([not row["ended"] for row in rows])
    seconds = np.mean([row["seconds"] for row in rows])
    return f"{error_rate(rows):.3f} | {more:.2f} | {fewer:.2f} | {cut:.2f} | {seconds:.2f}"


# --------------------------------------------------------------------------- voices


def voices(args: argparse.Namespace) -> None:
    """Speaks with and without prompts; prints word error rates and writes OUT/voices.jsonl."""
    setup = prepare(args)
    number = max(args.quantizers)
    prompts = find_prompts(setup.tests)
    models = {Path(path).name: speech.load(path) for path in args.checkpoint}
    begin(args)
    lines = []
    _row(setup, PEOPLE, number, lambda system: people(setup, number, system))
    for row in setup.tests:
        path = f"{PEOPLE}/q{number}/{setup.dataset}/syn_audios/{row['name']}"
        lines.append({"path": path, "who": PEOPLE, "speaker": row["speaker"]})
    texts = [row["transcript"] for row in setup.tests]
    for name, model in models.items():
        for prompt, chosen in prompts.items():
            who = f"{name}-{prompt}"
            requests = [_request(text, row) for text, row in zip(texts, chosen, strict=True)]
            _row(
                setup, who, number,
                lambda system, r=requests, m=model: speak(setup, m, r, number, system),
            )  # fmt: skip
            for own, row in zip(setup.tests, chosen, strict=True):
                lines.append({
                    "path": f"{who}/q{number}/{setup.dataset}/syn_audios/{own['name']}",
                    "who": who, "speaker": own["speaker"], "prompt": row and row["speaker"],
                })  # fmt: skip
    files.write_text(setup.out / "voices.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
    print(pages.write_evaluation(setup.out))


def find_prompts(
    tests: Sequence[dict[str, Any]],
) -> dict[str, list[dict[str, Any] | None]]:
    """For each kind of prompt, a recording for each test: of another text, or None.

    Raises:
      ValueError: There are fewer than two speakers, or one has recordings of one text only.
    """
    same: list[dict[str, Any] | None] = []
    other: list[dict[str, Any] | None] = []
    speakers = sorted({row["speaker"] for row in tests})
    texts = {(row["speaker"], row["transcript"]) for row in tests}
    for speaker in speakers:
        if len(speakers) < 2 or sum(name == speaker for name, _ in texts) < 2:
            raise ValueError("voices needs two or more speakers with two or more texts each")
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
    parser.add_argument("--codec", help="of the speech models; default: the recogniser's")
    parser.add_argument("--recogniser", help="codec with a language model; default: PocketSphinx")
    parser.add_argument(
        "--only-test-words", action="store_true", help="PocketSphinx knows no other words"
    )
    parser.add_argument("--test", type=Path, default=Path("sequences/test"))
    parser.add_argument("--split", default="test", help="of the recordings of --test")
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
