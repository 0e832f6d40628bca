"""Measures what speech models say: words, endings, speed. See `speech.md`.

    python experiments/speech_study.py words --digits=digits --checkpoint=runs/tts_digits
    python experiments/speech_study.py speed --checkpoint=runs/tts_digits

`words`: word error rates of generated texts at each number of quantizers, beside the same texts
spoken by people (their codes, decoded), and how many texts run to the longest duration, gain or
lose words. `speed`: the first block and the real-time factor of `speech.stream`. `digits` is the
output of `spoken_digits.py`. What OUT already has is not computed again. All words are read by
`digit_reader.py`. Its templates are clips that the speech model has not heard, decoded from the
same number of quantizers.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import digit_reader
import jiwer
import librosa
import numpy as np

import moss_tok
from moss_tok import speech
from moss_tok.audio import files
from moss_tok.cli.commands import Parser
from moss_tok.codec.inference import Codec, decode_batch, encode_batch
from moss_tok.json_files import read_json_lines
from moss_tok.speech import generate
from moss_tok.speech.sampling import DEFAULT

NUMBERS = (1, 2, 4, 8, 16)  # of quantizers
BATCH = 25


def read_recordings(folder: Path, args: argparse.Namespace, number: int) -> list[dict[str, Any]]:
    """The first recordings of a folder that are short enough, with their audio "wav" [S]."""
    found = []
    for _, row in read_json_lines(folder / "manifest.jsonl"):
        fits = row["duration_s"] <= args.seconds and args.speaker in ("", row["speaker"])
        if fits and len(found) < number:
            wav = files.read(folder / row["path"], digit_reader.RATE, 1)[0]
            found.append(row | {"wav": wav})
    return found


def _few_sizes(num_frames: int) -> int:
    """A length for arrays: one of few, because a program is compiled for each."""
    return 40 * -(-num_frames // 40)


def encode_all(codec: Codec, wavs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Codes [Q, T] of recordings [C, S], with one program."""
    size = _few_sizes(codec.config.num_frames(max(wav.shape[1] for wav in wavs)))
    found = []
    for start in range(0, len(wavs), BATCH):
        part = list(wavs[start : start + BATCH])
        padded = part + part[:1] * (BATCH - len(part))
        found += encode_batch(codec, padded, num_frames=size)[: len(part)]
    return found


def decode_all(codec: Codec, codes: Sequence[np.ndarray], number: int) -> list[np.ndarray]:
    """Audio [S] of the first `number` of the codes [q, T], with one program for all numbers."""
    limit = codec.config.quantizer.num_quantizers
    size = _few_sizes(max(x.shape[1] for x in codes))
    found = []
    for start in range(0, len(codes), BATCH):
        part = [np.pad(x, ((0, limit - len(x)), (0, 0))) for x in codes[start : start + BATCH]]
        padded = part + part[:1] * (BATCH - len(part))
        wavs = decode_batch(codec, padded, number, num_frames=size)
        found += [wav[0] for wav in wavs[: len(part)]]
    return found


def sampling_of(args: argparse.Namespace) -> speech.Sampling:
    """How models sample."""
    channel = speech.Channel(
        temperature=args.temperature, repetition_penalty=args.repetition_penalty
    )
    return dataclasses.replace(DEFAULT, first=channel, others=channel)


# --------------------------------------------------------------------------- words


class Study:
    """People's recordings as codes, and readers.

    Attributes:
      codec: Of the codes of all speech models.
      sampling: How models sample.
      tests: Recordings that no speech model has heard, with their "codes".
      singles: Other such recordings, of one word each.
    """

    def __init__(self, args: argparse.Namespace):
        """Encodes the recordings, unless OUT has their codes."""
        self.codec = moss_tok.load(args.codec)
        self.sampling = sampling_of(args)
        self.out = args.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.tests = self._encoded("test", read_recordings(args.digits / "test", args, args.number))
        heard = read_recordings(args.digits / "reader", args, 10**6)
        self.singles = self._encoded("reader", [r for r in heard if " " not in r["transcript"]])

    def _encoded(self, name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        path = self.out / f"{name}.npz"
        if not path.exists():
            found = encode_all(self.codec, [row["wav"][None] for row in rows])
            np.savez(path, *(x.astype(np.int16) for x in found))
        with np.load(path) as saved:
            for index, row in enumerate(rows):
                row["codes"] = saved[f"arr_{index}"].astype(np.int32)
        return rows

    def reader(self, number: int) -> digit_reader.Reader:
        """A reader that is used to the sound of this number of quantizers."""
        wavs = decode_all(self.codec, [row["codes"] for row in self.singles], number)
        trimmed = [librosa.effects.trim(wav, top_db=30)[0] for wav in wavs]
        words = [row["transcript"] for row in self.singles]
        return digit_reader.Reader.of(list(zip(words, trimmed, strict=True)))


# What is heard of each text, its "seconds", and whether the model has "ended" it.
Rows = list[dict[str, Any]]


def words(args: argparse.Namespace) -> None:
    """Prints the table of word error rates and of faults."""
    study = Study(args)
    texts = [row["transcript"] for row in study.tests]
    print(f"{len(texts)} texts, {len(study.singles)} templates")
    print("| speech of | quantizers | WER | more words | fewer words | cut | seconds |")
    print("|---|---|---|---|---|---|---|")
    models = {Path(path).name: speech.load(path) for path in args.checkpoint}
    for number in NUMBERS:
        reader = None
        for name, model in {"people": None, **models}.items():
            if model is not None and number > model.config.num_quantizers:
                continue
            path = study.out / f"{name}-{number}.json"
            if not path.exists():
                reader = reader or study.reader(number)
                path.write_text(json.dumps(_measure(study, reader.read, model, number, path)))
            print_words(name, number, texts, json.loads(path.read_text()))


def _measure(
    study: Study,
    read: Callable[[np.ndarray], str],
    model: speech.Speech | None,
    number: int,
    path: Path,
) -> Rows:
    """Reads the texts as a model speaks them, and writes its audio; None: as people do."""
    codes = [row["codes"] for row in study.tests]
    ended = [True] * len(codes)
    if model is not None:
        requests = [speech.Request(row["transcript"]) for row in study.tests]
        spoken = generate.generate(model, requests, study.sampling, num_quantizers=number)
        codes = [result.codes for result in spoken]
        ended = [result.ended for result in spoken]
    wavs = decode_all(study.codec, codes, number)
    rows = []
    for index, (wav, end) in enumerate(zip(wavs, ended, strict=True)):
        if model is not None:
            path.with_suffix("").mkdir(exist_ok=True)
            files.write(path.with_suffix("") / f"{index:03}.wav", wav[None], digit_reader.RATE)
        seconds = len(wav) / digit_reader.RATE
        rows.append({"heard": read(wav), "seconds": seconds, "ended": end})
    return rows


def print_words(name: str, number: int, texts: Sequence[str], rows: Rows) -> None:
    """Prints a row of the table."""
    heard = [row["heard"] for row in rows]
    rate = jiwer.wer(list(texts), heard)
    change = [len(x.split()) - len(text.split()) for x, text in zip(heard, texts, strict=True)]
    more = np.mean(np.array(change) > 0)
    fewer = np.mean(np.array(change) < 0)
    cut = np.mean([not row["ended"] for row in rows])
    seconds = np.mean([row["seconds"] for row in rows])
    cells = f"{more:.2f} | {fewer:.2f} | {cut:.2f} | {seconds:.2f}"
    print(f"| {name} | {number} | {rate:.3f} | {cells} |", flush=True)


# --------------------------------------------------------------------------- speed


def speed(args: argparse.Namespace) -> None:
    """Prints the time to the first block and the real-time factor, by processor and by clock."""
    codec = moss_tok.load(args.codec)
    for checkpoint in args.checkpoint:
        model = speech.load(checkpoint)
        request = speech.Request("four seven")
        sampling = sampling_of(args)
        found = []
        for seed in range(4):
            start = np.array([time.perf_counter(), time.process_time()])
            first = None
            samples = 0
            for wav in speech.stream(model, codec, request, sampling, seed):
                now = np.array([time.perf_counter(), time.process_time()])
                first = now - start if first is None else first
                samples += wav.shape[1]
            factor = (now - start) / (samples / codec.config.sample_rate)
            found.append([*first, *factor])
        # The first text compiles the programs.
        wall, processor, wall_factor, processor_factor = np.median(found[1:], axis=0)
        print(f"{checkpoint}, medians of {len(found) - 1} texts:")
        print(f"first block: {1000 * processor:.0f} ms of processor time, {1000 * wall:.0f} ms")
        print(f"real-time factor: {processor_factor:.2f} by processor time, {wall_factor:.2f}")


def main() -> None:
    """Runs a study."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=("words", "speed"))
    parser.add_argument("--checkpoint", action="append", default=[], help="speech model")
    parser.add_argument("--codec", help="its codec (default: the one in the package)")
    parser.add_argument("--digits", type=Path, default=Path("digits"))
    parser.add_argument("--out", type=Path, default=Path("study"))
    parser.add_argument("--speaker", default="", help="only recordings of this speaker")
    parser.add_argument("--temperature", type=float, default=DEFAULT.first.temperature)
    penalty = DEFAULT.first.repetition_penalty
    parser.add_argument("--repetition-penalty", type=float, default=penalty)
    parser.add_argument("--number", type=int, default=100, help="most texts")
    parser.add_argument("--seconds", type=float, default=1.6, help="longest recording of people")
    args = parser.parse_args()
    {"words": words, "speed": speed}[args.study](args)


if __name__ == "__main__":
    main()
