"""Measures what speech models say: words, endings, voices, speed. See `speech.md`.

    python experiments/speech_study.py words --digits=digits --out=study --checkpoint=runs/tts ...
    python experiments/speech_study.py voices --digits=digits --out=study --checkpoint=runs/prompted
    python experiments/speech_study.py speed --out=study --checkpoint=runs/tts

`words`: word error rates of 100 generated texts at each number of quantizers, beside the same texts
spoken by people (their codes, decoded), and how many texts run to the longest duration, gain or
lose words. `voices`: whether a prompt chooses the voice. `speed`: the first block and the real-time
factor of `speech.stream`. `digits` is the output of `spoken_digits.py`. What OUT already has is not
computed again. All words are read by `digit_reader.py`, whose templates are clips that the
speech model has not heard.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import digit_reader
import jiwer
import librosa
import numpy as np

import moss_tok
from moss_tok import speech
from moss_tok.audio import files
from moss_tok.cli.main import Parser
from moss_tok.codec.inference import Codec, decode_batch, encode_batch
from moss_tok.json_files import read_json_lines
from moss_tok.speech import generate

NUMBERS = (1, 2, 4, 8, 16)  # of quantizers
BATCH = 25
PENALTIES = (0.0, 3.0, 6.0, 12.0)


def read_recordings(folder: Path, number: int, seconds: float) -> list[dict[str, Any]]:
    """The first recordings of a folder that are short enough, with their audio "wav" [S]."""
    found = []
    for _, row in read_json_lines(folder / "manifest.jsonl"):
        if row["duration_s"] <= seconds and len(found) < number:
            wav = files.read(folder / row["path"], digit_reader.RATE, 1)[0]
            found.append(row | {"wav": wav})
    return found


def encode_all(codec: Codec, wavs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Codes [Q, T] of recordings [C, S], with one program."""
    size = codec.config.num_frames(max(wav.shape[1] for wav in wavs))
    found = []
    for start in range(0, len(wavs), BATCH):
        part = list(wavs[start : start + BATCH])
        padded = part + part[:1] * (BATCH - len(part))
        found += encode_batch(codec, padded, num_frames=size)[: len(part)]
    return found


def decode_all(codec: Codec, codes: Sequence[np.ndarray], number: int) -> list[np.ndarray]:
    """Audio [S] of the first `number` of the codes [q, T], with one program for all numbers."""
    limit = codec.config.quantizer.num_quantizers
    size = 32 * -(-max(x.shape[1] for x in codes) // 32)
    found = []
    for start in range(0, len(codes), BATCH):
        part = [np.pad(x, ((0, limit - len(x)), (0, 0))) for x in codes[start : start + BATCH]]
        padded = part + part[:1] * (BATCH - len(part))
        wavs = decode_batch(codec, padded, number, num_frames=size)
        found += [wav[0] for wav in wavs[: len(part)]]
    return found


class Study:
    """What all studies share: the codec, the people's recordings, and the reader.

    Attributes:
      codec: Of the codes of all speech models.
      tests: Recordings of people that no model has heard, with their "codes".
      heard: Recordings that speech models have not heard.
      others: Recordings that speech models have heard.
      out: Folder of the results.
    """

    def __init__(self, args: argparse.Namespace):
        """Encodes the recordings, unless OUT has their codes."""
        self.codec = moss_tok.load(args.codec)
        self.out = args.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.tests = self._people("test", args.digits, args.number, args.seconds)
        self.heard = self._people("reader", args.digits, 800, args.seconds)
        self.others = self._people("speech", args.digits, 50, args.seconds)

    def _people(self, name: str, digits: Path, number: int, seconds: float) -> list[dict[str, Any]]:
        rows = read_recordings(digits / name, number, seconds)
        path = self.out / f"{name}.npz"
        if not path.exists():
            found = encode_all(self.codec, [row["wav"][None] for row in rows])
            np.savez(path, *(x.astype(np.int16) for x in found))
        with np.load(path) as saved:
            for index, row in enumerate(rows):
                row["codes"] = saved[f"arr_{index}"].astype(np.int32)
        return rows

    def reader(self) -> digit_reader.Reader:
        """A reader with one-word recordings of people as templates, decoded from their codes.

        The penalty is the one with the fewest errors on sequences that are no templates.
        """
        singles = [row for row in self.heard if " " not in row["transcript"]]
        wavs = decode_all(self.codec, [row["codes"] for row in singles], NUMBERS[-1])
        trimmed = [librosa.effects.trim(wav, top_db=30)[0] for wav in wavs]
        words = [row["transcript"] for row in singles]
        templates = list(zip(words, trimmed, strict=True))
        path = self.out / "penalty.json"
        if path.exists():
            return digit_reader.Reader.of(templates, json.loads(path.read_text()))
        audio = decode_all(self.codec, [row["codes"] for row in self.others], NUMBERS[-1])
        rates = {}
        for penalty in PENALTIES:
            reader = digit_reader.Reader.of(templates, penalty)
            texts = [reader.read(wav) for wav in audio]
            rates[penalty] = jiwer.wer([row["transcript"] for row in self.others], texts)
            print(f"penalty {penalty:g}: word error rate {rates[penalty]:.3f}", flush=True)
        best = min(rates, key=rates.get)
        path.write_text(json.dumps(best))
        return digit_reader.Reader.of(templates, best)


# --------------------------------------------------------------------------- words


def words(args: argparse.Namespace) -> None:
    """Prints the table of word error rates and the table of faults."""
    study = Study(args)
    reader = study.reader()
    texts = [row["transcript"] for row in study.tests]
    codes = [row["codes"] for row in study.tests]
    print(f"{len(texts)} texts")
    print("| speech of | quantizers | WER | extra words | fewer words | cut | seconds |")
    print("|---|---|---|---|---|---|---|")
    for number in NUMBERS:
        path = study.out / f"people-{number}.json"
        if not path.exists():
            wavs = decode_all(study.codec, codes, number)
            rows = [{"heard": reader.read(wav), "seconds": len(wav) / digit_reader.RATE,
                     "ended": True} for wav in wavs]  # fmt: skip
            path.write_text(json.dumps(rows))
        print_words("people", number, texts, json.loads(path.read_text()))
    for checkpoint in args.checkpoint:
        model = speech.load(checkpoint)
        name = Path(checkpoint).name
        for number in NUMBERS:
            if number > model.config.num_quantizers:
                continue
            path = study.out / f"{name}-{number}.json"
            if not path.exists():
                rows = speak(study, reader, model, texts, number, study.out / f"{name}-{number}")
                path.write_text(json.dumps(rows))
            print_words(name, number, texts, json.loads(path.read_text()))


def speak(
    study: Study,
    reader: digit_reader.Reader,
    model: speech.Speech,
    texts: Sequence[str],
    number: int,
    folder: Path,
) -> list[dict[str, Any]]:
    """What is heard of each text, its seconds, and whether the model ended it; writes audio."""
    requests = [speech.Request(text) for text in texts]
    spoken = generate.generate(model, requests, num_quantizers=number)
    wavs = decode_all(study.codec, [result.codes for result in spoken], number)
    folder.mkdir(exist_ok=True)
    rows = []
    for index, (wav, result) in enumerate(zip(wavs, spoken, strict=True)):
        files.write(folder / f"{index:03}.wav", wav[None], digit_reader.RATE)
        seconds = len(wav) / digit_reader.RATE
        rows.append({"heard": reader.read(wav), "seconds": seconds, "ended": result.ended})
    return rows


def print_words(name: str, number: int, texts: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Prints a row of the table."""
    heard = [row["heard"] for row in rows]
    rate = jiwer.wer(list(texts), heard)
    more = [len(x.split()) > len(text.split()) for x, text in zip(heard, texts, strict=True)]
    fewer = [len(x.split()) < len(text.split()) for x, text in zip(heard, texts, strict=True)]
    cut = np.mean([not row["ended"] for row in rows])
    seconds = np.mean([row["seconds"] for row in rows])
    shares = f"{np.mean(more):.2f} | {np.mean(fewer):.2f} | {cut:.2f} | {seconds:.2f}"
    print(f"| {name} | {number} | {rate:.3f} | {shares} |", flush=True)


# --------------------------------------------------------------------------- voices


def voice(wav: np.ndarray) -> np.ndarray:
    """Means and deviations of the mel cepstra of the loud frames, without the energy, [2 (C - 1)].

    They describe the long-term spectrum, so the same speaker has similar ones for all words.
    """
    found = digit_reader.cepstra(wav)
    loud = found[0] > found[0].max() - 120
    return np.concatenate([found[1:, loud].mean(axis=1), found[1:, loud].std(axis=1)])


class Voices:
    """The mean voice of each speaker, and the distance of two voices.

    The distance is Mahalanobis's with the covariance of recordings of one speaker, which says what
    differences the words make.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], wavs: Sequence[np.ndarray]):
        """Of recordings of people."""
        found = np.array([voice(wav) for wav in wavs])
        speakers = np.array([row["speaker"] for row in rows])
        self.names = sorted(set(speakers))
        self.means = np.array([found[speakers == name].mean(axis=0) for name in self.names])
        residuals = found - self.means[np.searchsorted(self.names, speakers)]
        self._whiten = np.linalg.cholesky(np.linalg.inv(np.cov(residuals.T)))

    def distances(self, wav: np.ndarray) -> np.ndarray:
        """Distances [N] to each speaker."""
        return np.linalg.norm((self.means - voice(wav)) @ self._whiten, axis=1)


def voices(args: argparse.Namespace) -> None:
    """Prints how often, and how closely, speech has the voice of a speaker."""
    study = Study(args)
    rows = study.heard[:400]
    wavs = decode_all(study.codec, [row["codes"] for row in rows], 8)
    known = Voices(rows, wavs)
    tests = study.tests
    people = decode_all(study.codec, [row["codes"] for row in tests], 8)
    print("| speech of | nearest to its speaker | distance to its speaker | to the others |")
    print("|---|---|---|---|")
    speakers = [row["speaker"] for row in tests]
    print_voices("people", known, people, speakers)
    for checkpoint in args.checkpoint:
        model = speech.load(checkpoint)
        # The prompt of a text is the next test recording of the same speaker.
        prompts = [_next(tests, index) for index in range(len(tests))]
        plain = [speech.Request(row["transcript"]) for row in tests]
        prompted = [
            speech.with_prompt(model.config, row["transcript"], other["codes"], other["transcript"])
            for row, other in zip(tests, prompts, strict=True)
        ]
        number = min(8, model.config.num_quantizers)
        for name, requests in (("with the prompt", prompted), ("without", plain)):
            spoken = generate.generate(model, requests, num_quantizers=number)
            wavs = decode_all(study.codec, [result.codes for result in spoken], number)
            print_voices(f"{Path(checkpoint).name}, {name}", known, wavs, speakers)


def _next(tests: Sequence[dict[str, Any]], index: int) -> dict[str, Any]:
    """The next recording of the same speaker."""
    turned = [*tests[index + 1 :], *tests[:index]]
    return next(row for row in turned if row["speaker"] == tests[index]["speaker"])


def print_voices(
    name: str, known: Voices, wavs: Sequence[np.ndarray], speakers: Sequence[str]
) -> None:
    """Prints a row of the table."""
    found = np.array([known.distances(wav) for wav in wavs])
    own = np.array([known.names.index(speaker) for speaker in speakers])
    places = np.arange(len(own))
    right = np.mean(found.argmin(axis=1) == own)
    to_own = found[places, own]
    to_others = (found.sum(axis=1) - to_own) / (found.shape[1] - 1)
    print(f"| {name} | {right:.2f} | {to_own.mean():.2f} | {to_others.mean():.2f} |", flush=True)


# --------------------------------------------------------------------------- speed


def speed(args: argparse.Namespace) -> None:
    """Prints the time to the first block and the real-time factor, by processor and by clock."""
    codec = moss_tok.load(args.codec)
    for checkpoint in args.checkpoint:
        model = speech.load(checkpoint)
        request = speech.Request("four seven two")
        for _ in speech.stream(model, codec, request):
            pass  # compiles
        found = []
        for seed in range(1, 6):
            start = np.array([time.perf_counter(), time.process_time()])
            first = None
            samples = 0
            for wav in speech.stream(model, codec, request, seed=seed):
                now = np.array([time.perf_counter(), time.process_time()])
                first = now - start if first is None else first
                samples += wav.shape[1]
            factor = (now - start) / (samples / codec.config.sample_rate)
            found.append([*first, *factor])
        wall, processor, wall_factor, processor_factor = np.median(found, axis=0)
        print(f"{checkpoint}, medians of 5 texts:")
        print(f"first block: {1000 * processor:.0f} ms of processor time, {1000 * wall:.0f} ms")
        print(f"real-time factor: {processor_factor:.2f} by processor time, {wall_factor:.2f}")


def main() -> None:
    """Runs a study."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=("words", "voices", "speed"))
    parser.add_argument("--checkpoint", action="append", default=[], help="speech model")
    parser.add_argument("--codec", help="its codec (default: the one in the package)")
    parser.add_argument("--digits", type=Path, default=Path("digits"))
    parser.add_argument("--out", type=Path, default=Path("study"))
    parser.add_argument("--number", type=int, default=100, help="number of texts")
    parser.add_argument("--seconds", type=float, default=1.6, help="longest recording of people")
    args = parser.parse_args()
    {"words": words, "voices": voices, "speed": speed}[args.study](args)


if __name__ == "__main__":
    main()
