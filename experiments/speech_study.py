"""Measures what speech models say: words, endings, speed. See `speech.md`.

    python experiments/speech_study.py words --digits=digits --checkpoint=runs/tts_digits
    python experiments/speech_study.py speed --checkpoint=runs/tts_digits
    python experiments/speech_study.py speed

`words` prints the word error rate of generated speech at each number of quantizers, beside that of
the same texts spoken by people (their codes, decoded). It also counts the texts that were cut at
the longest duration, that gained words and that lost words. `digits` is the output of
`spoken_digits.py`. What OUT already has is not computed again. `digit_reader.py` reads all words.
Its templates are clips that the speech model has not heard, decoded from the same number of
quantizers.

`speed` prints the time to the first block and the real-time factor of `speech.stream`. Without a
checkpoint, it measures a random model with the shape of `tts_digits.flags`; the weights do not
change the speed.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import digit_reader
import jax
import jiwer
import librosa
import numpy as np
from flax import linen as nn

import moss_tok
from moss_tok import speech
from moss_tok.audio import files
from moss_tok.batching import batch_by_shape
from moss_tok.cli.commands import Parser
from moss_tok.codec.inference import Codec, decode_batch, encode_batch
from moss_tok.json_files import read_json_lines
from moss_tok.language.text import ByteTokenizer
from moss_tok.speech import generate, layout, pretrained
from moss_tok.speech.config import preset
from moss_tok.speech.sampling import DEFAULT

NUMBERS = (1, 2, 4, 8, 16)  # of quantizers
BATCH = 25
NUM_STREAMS = 7  # of which medians are taken


def read_recordings(folder: Path, args: argparse.Namespace, number: int) -> list[dict[str, Any]]:
    """The first recordings of a folder that are short enough, with their audio "wav" [S]."""
    recordings: list[dict[str, Any]] = []
    for _, row in read_json_lines(folder / "manifest.jsonl"):
        if len(recordings) == number:
            break
        if row["duration_s"] <= args.seconds and args.speaker in ("", row["speaker"]):
            wav = files.read(folder / row["path"], digit_reader.RATE, 1)[0]
            recordings.append(row | {"wav": wav})
    return recordings


def _few_sizes(num_frames: int) -> int:
    """A length for arrays: one of few, because a program is compiled for each."""
    return 40 * -(-num_frames // 40)


def encode_all(codec: Codec, wavs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Codes [Q, T] of recordings [C, S], with one program."""
    size = _few_sizes(codec.config.num_frames(max(wav.shape[1] for wav in wavs)))
    codes: list[np.ndarray] = []
    for _, rows, padded_rows in batch_by_shape([size] * len(wavs), BATCH):
        batch = encode_batch(codec, [wavs[row] for row in padded_rows], num_frames=size)
        codes += batch[: len(rows)]
    return codes


def decode_all(codec: Codec, codes: Sequence[np.ndarray], number: int) -> list[np.ndarray]:
    """Audio [S] of the first `number` of the codes [q, T], with one program for all numbers."""
    limit = codec.config.quantizer.num_quantizers
    size = _few_sizes(max(x.shape[1] for x in codes))
    wavs: list[np.ndarray] = []
    for _, rows, padded_rows in batch_by_shape([size] * len(codes), BATCH):
        batch = []
        for row in padded_rows:
            num_missing = limit - len(codes[row])
            batch.append(np.pad(codes[row], ((0, num_missing), (0, 0))))
        decoded = decode_batch(codec, batch, number, num_frames=size)
        wavs += [wav[0] for wav in decoded[: len(rows)]]
    return wavs


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
        recordings = read_recordings(args.digits / "reader", args, 10**6)
        singles = [row for row in recordings if " " not in row["transcript"]]
        self.singles = self._encoded("reader", singles)

    def _encoded(self, name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        path = self.out / f"{name}.npz"
        if not path.exists():
            codes = encode_all(self.codec, [row["wav"][None] for row in rows])
            np.savez(path, *(recording.astype(np.int16) for recording in codes))
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


# For each text: the words "heard", the "seconds", and whether the model "ended" the speech.
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
    num_heard = np.array([len(words.split()) for words in heard])
    num_written = np.array([len(text.split()) for text in texts])
    more = np.mean(num_heard > num_written)
    fewer = np.mean(num_heard < num_written)
    cut = np.mean([not row["ended"] for row in rows])
    seconds = np.mean([row["seconds"] for row in rows])
    cells = f"{more:.2f} | {fewer:.2f} | {cut:.2f} | {seconds:.2f}"
    print(f"| {name} | {number} | {rate:.3f} | {cells} |", flush=True)


# --------------------------------------------------------------------------- speed


def random_model(codec: Codec) -> speech.Speech:
    """A random model with the shape of `tts_digits.flags`, which never ends speech by itself."""
    tokenizer = ByteTokenizer()
    config = preset(
        "tiny",
        codebook_size=codec.config.quantizer.codebook_size,
        num_quantizers=8,
        frame_rate=codec.config.frame_rate,
        **layout.token_fields(tokenizer),
    )
    init = jax.jit(pretrained.init_boxed, static_argnums=0)
    params = nn.meta.unbox(init(config, jax.random.key(0)))
    # silu(x) x times a positive matrix is positive, so that the frame is always more likely than
    # the end of speech.
    heads = params["out"]
    heads["up"] = heads["up"].at[0].set(heads["gate"][0])
    heads["down"] = heads["down"].at[0].set(abs(heads["down"][0]))
    heads["text_head"] = heads["text_head"].at[:, config.slot_id].set(1)
    heads["text_head"] = heads["text_head"].at[:, config.end_id].set(-1)
    return speech.Speech(params, config, tokenizer)


def _clocks() -> np.ndarray:
    """Seconds by the clock and of processor time."""
    return np.array([time.perf_counter(), time.process_time()])


def stream_seconds(
    model: speech.Speech, codec: Codec, sampling: speech.Sampling, number: int, seed: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Streams a text.

    Returns:
      Seconds to the first block and in total, both by the clock and of processor time; and seconds
      of audio.
    """
    start = _clocks()
    first = None
    num_samples = 0
    request = speech.Request("four seven")
    for wav in speech.stream(model, codec, request, sampling, seed, number):
        if first is None:
            first = _clocks() - start
        num_samples += wav.shape[1]
    return first, _clocks() - start, num_samples / codec.config.sample_rate


def speed(args: argparse.Namespace) -> None:
    """Prints the time to the first block and the real-time factor."""
    codec = moss_tok.load(args.codec)
    models = {path: speech.load(path) for path in args.checkpoint}
    if not models:
        models["random weights"] = random_model(codec)
    print("| model | quantizers | first block, ms of processor time (clock) | real-time factor "
          "by processor time (clock) |")  # fmt: skip
    print("|---|---|---|---|")
    for name, model in models.items():
        for number in NUMBERS:
            if number <= model.config.num_quantizers:
                _print_speed(name, model, codec, sampling_of(args), number)


def _print_speed(
    name: str, model: speech.Speech, codec: Codec, sampling: speech.Sampling, number: int
) -> None:
    """Prints a row of medians."""
    stream_seconds(model, codec, sampling, number, seed=0)  # compiles the programs
    first_blocks = []
    factors = []
    for seed in range(NUM_STREAMS):
        first, total, audio_seconds = stream_seconds(model, codec, sampling, number, seed)
        first_blocks.append(1000 * first)
        factors.append(total / audio_seconds)
    clock, processor = np.median(first_blocks, axis=0)
    clock_factor, processor_factor = np.median(factors, axis=0)
    print(f"| {name} | {number} | {processor:.0f} ({clock:.0f}) | {processor_factor:.2f} "
          f"({clock_factor:.2f}) |", flush=True)  # fmt: skip


def main() -> None:
    """Runs a study."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=("words", "speed"))
    parser.add_argument(
        "--checkpoint", action="append", default=[], help="speech model; repeat for several"
    )
    parser.add_argument("--codec", help="its codec (default: the one in the package)")
    parser.add_argument("--digits", type=Path, default=Path("digits"))
    parser.add_argument("--out", type=Path, default=Path("study"))
    parser.add_argument("--speaker", default="", help="only recordings of this speaker")
    parser.add_argument("--temperature", type=float, default=DEFAULT.first.temperature)
    penalty = DEFAULT.first.repetition_penalty
    parser.add_argument("--repetition-penalty", type=float, default=penalty)
    parser.add_argument("--number", type=int, default=100, help="largest number of texts")
    parser.add_argument("--seconds", type=float, default=1.6, help="longest recording of people")
    args = parser.parse_args()
    {"words": words, "speed": speed}[args.study](args)


if __name__ == "__main__":
    main()
