"""Speaks a text, or each text of a file, with a checkpoint of a speech model."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moss_tok.cli import arguments, speech_lists
from moss_tok.cli.speech_lists import Row

EXAMPLE = 'moss-tok speak "four seven two" speech.wav --checkpoint runs/tts'

_PCM = {"s16": ("<i2", 32768), "f32": ("<f4", 1)}  # type, full scale
_STDOUT = "-"
_TEXTS_AT_ONCE = 64  # the files of so many texts are written together
_GROUPS = "the text channel, the first quantizer and the other quantizers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "text",
        metavar="TEXT",
        help="what to say; or a file of texts: .txt, one per line; .jsonl, objects with text and "
        "optionally id, prompt, prompt_text, language and instruction; or .lst, lines of "
        "Seed-TTS-eval",
    )
    parser.add_argument(
        "output",
        metavar="OUT.wav",
        help="wav, flac or ogg file; for a file of texts: a folder of wav; -: standard output, "
        "to which the speech is written while it is sampled",
    )
    arguments.add_codec(parser, required=True)
    parser.add_argument(
        "--codec",
        metavar="C",
        help="codec of the speech model: a checkpoint, workdir, official directory or Hub id "
        "(default: the one in the settings of the training workdir)",
    )
    parser.add_argument("--prompt", metavar="REF.wav", help="recording of the voice to speak with")
    parser.add_argument(
        "--prompt-text", default="", metavar="TEXT", help="what is said in the prompt"
    )
    parser.add_argument(
        "--pcm",
        choices=tuple(_PCM),
        help="with -: write raw samples, 16-bit integers or 32-bit floats, instead of WAV",
    )
    _add_sampling(parser)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    parser.add_argument(
        "--temperature",
        default="1",
        metavar="X",
        help="temperature of the codes; 0 always takes the most likely (default: 1). This option "
        f"and the next three also take three numbers, as in 1,0.8,1: for {_GROUPS}",
    )
    parser.add_argument(
        "--top-k",
        default="50",
        metavar="K",
        help="sample codes from the K most likely ones; 0: all (default: 50)",
    )
    parser.add_argument(
        "--top-p",
        default="0.95",
        metavar="P",
        help="sample codes from the most likely ones whose probabilities sum to P (default: 0.95)",
    )
    parser.add_argument(
        "--repetition-penalty",
        default="1.1",
        metavar="X",
        help="penalty of codes that occurred before; 1: none (default: 1.1)",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    is_list = speech_lists.is_list(args.text)
    sampling = _parse_sampling(args)
    _check_output(args, is_list)
    if is_list:
        rows = speech_lists.read(Path(args.text), args.prompt or "", args.prompt_text)
    else:
        rows = [Row("", args.text, args.prompt or "", args.prompt_text)]
    speech, codec = _load(args)
    requests = _requests(speech, codec, rows)
    if is_list:
        _speak_list(args, speech, codec, rows, requests, sampling)
    elif args.output == _STDOUT:
        _speak_to_stdout(args, speech, codec, requests[0], sampling)
    else:
        _speak_to_file(args, speech, codec, requests[0], sampling)


def _parse_sampling(args: argparse.Namespace) -> Any:
    """How to sample; ValueError if an option is out of range."""
    from moss_tok.speech.sampling import DEFAULT, Channel, Sampling, check_seed

    check_seed(args.seed)
    if args.prompt_text and not args.prompt:
        raise ValueError("prompt-text needs --prompt, the recording in which it is said")
    columns = [
        _parse_numbers("temperature", args.temperature, float, DEFAULT.text.temperature),
        _parse_numbers("top-k", args.top_k, int, DEFAULT.text.top_k),
        _parse_numbers("top-p", args.top_p, float, DEFAULT.text.top_p),
        _parse_numbers(
            "repetition-penalty", args.repetition_penalty, float, DEFAULT.text.repetition_penalty
        ),
    ]
    text, first, others = (Channel(*values) for values in zip(*columns, strict=True))
    return Sampling(text, first, others)


def _parse_numbers(
    name: str, option: str, number: Callable[[str], Any], text_default: Any
) -> list[Any]:
    """The values of an option for the three groups; a single number is for the codes."""
    try:
        values = [number(part) for part in option.split(",")]
    except ValueError:
        values = []
    if len(values) == 1:
        return [text_default, *values, *values]
    if len(values) != 3:
        kind = "an integer" if number is int else "a number"
        raise ValueError(f"{name} must be {kind}, or three for {_GROUPS}, got {option!r}")
    return values


def _check_output(args: argparse.Namespace, is_list: bool) -> None:
    from moss_tok.audio import files

    if args.output == _STDOUT:
        arguments.check_standard_output()
    if is_list and (args.output == _STDOUT or Path(args.output).is_file()):
        raise ValueError(f"{args.output}: the output of a file of texts must be a folder")
    if args.pcm and args.output != _STDOUT:
        raise ValueError("pcm is for standard output, as in: moss-tok speak TEXT - --pcm s16")
    if not is_list and args.output != _STDOUT:
        files.check_output(args.output)
    if args.prompt and not Path(args.prompt).is_file():
        raise ValueError(f"{args.prompt}: no such file")


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The speech model and its codec."""
    import moss_tok
    from moss_tok.speech import generate, pretrained, speaking

    speech = pretrained.load(args.checkpoint)
    generate.check_num_quantizers(speech.config, args.num_quantizers)
    codec = moss_tok.load(args.codec or arguments.codec_of_run(args.checkpoint, "--codec"))
    speaking.check_codec(speech.config, codec)
    return speech, codec


def _requests(speech: Any, codec: Any, rows: Sequence[Row]) -> list[Any]:
    """What to say; ValueError if a row cannot be said."""
    from moss_tok.speech import generate

    prompts: dict[str, Any] = {}  # codes by file
    requests = []
    for row in rows:
        try:
            request = _request(speech, codec, row, prompts)
            generate.check_request(speech, request)
        except ValueError as error:
            place = f"{row.name}: " if row.name else ""
            raise ValueError(f"{place}{error}") from error
        requests.append(request)
    return requests


def _request(speech: Any, codec: Any, row: Row, prompts: dict[str, Any]) -> Any:
    """The request of a row; adds the codes of a new prompt to `prompts`."""
    from moss_tok.speech import layout, speaking

    layout.check_text(speech.config, speech.tokenizer, row.text)
    if not row.prompt:
        return layout.Request(row.text, details=row.details)
    if row.prompt not in prompts:
        prompts[row.prompt] = speaking.encode_prompt(codec, row.prompt)
    codes = prompts[row.prompt]
    return speaking.with_prompt(speech.config, row.text, codes, row.prompt_text, **row.details)


def _speak_list(
    args: argparse.Namespace,
    speech: Any,
    codec: Any,
    rows: Sequence[Row],
    requests: Sequence[Any],
    sampling: Any,
) -> None:
    import sys

    from moss_tok import storage
    from moss_tok.audio import files
    from moss_tok.speech import speaking

    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    storage.check_writable(folder)
    cut_names = []
    with arguments.counter(len(rows), args.text) as count:
        for start in range(0, len(rows), _TEXTS_AT_ONCE):
            some_requests = requests[start : start + _TEXTS_AT_ONCE]
            spoken = speaking.speak(
                speech, codec, some_requests, sampling, args.seed, args.num_quantizers, start
            )
            for row, result in zip(rows[start:], spoken, strict=False):
                files.write(folder / f"{row.name}.wav", result.wav, codec.config.sample_rate)
                if not result.ended:
                    cut_names.append(row.name)
                count()
    speech_lists.write_listing(folder, rows)
    print(f"{folder}: {len(rows)} files")
    if cut_names:
        names = ", ".join(cut_names)
        print(f"cut at the longest durations for their texts: {names}", file=sys.stderr)


def _stream(
    args: argparse.Namespace, speech: Any, codec: Any, request: Any, sampling: Any
) -> Iterator[Any]:
    """Blocks of audio, with a progress bar."""
    from moss_tok.speech import speaking

    blocks = speaking.stream_blocks(
        speech, codec, request, sampling, args.seed, args.num_quantizers
    )
    return arguments.progress(_wavs(blocks), 0.0, 1 / codec.config.frame_rate)


def _wavs(blocks: Iterable[Any]) -> Iterator[Any]:
    """The audio of blocks; says at the end if the speech was cut."""
    import sys

    ended = None
    for block in blocks:
        ended = block.ended
        if block.wav.shape[1]:
            yield block.wav
    if ended is False:
        print("cut at the longest duration for the text", file=sys.stderr)


def _speak_to_file(
    args: argparse.Namespace, speech: Any, codec: Any, request: Any, sampling: Any
) -> None:
    from moss_tok.audio import files

    config = codec.config
    num_samples = 0

    def count_samples(blocks: Iterable[Any]) -> Iterator[Any]:
        nonlocal num_samples
        for block in blocks:
            num_samples += block.shape[1]
            yield block

    blocks = count_samples(_stream(args, speech, codec, request, sampling))
    files.write_blocks(args.output, blocks, config.sample_rate, config.num_channels)
    print(f"{args.output}: {num_samples / config.sample_rate:.2f} s")


def _speak_to_stdout(
    args: argparse.Namespace, speech: Any, codec: Any, request: Any, sampling: Any
) -> None:
    import sys

    import numpy as np

    from moss_tok.audio import files

    dtype, full_scale = _PCM[args.pcm or "s16"]
    output = sys.stdout.buffer
    try:
        for number, wav in enumerate(_stream(args, speech, codec, request, sampling)):
            if not number and not args.pcm:
                output.write(_wav_header(codec.config.sample_rate, codec.config.num_channels))
            samples = files.to_pcm16(wav) if full_scale > 1 else wav
            output.write(np.ascontiguousarray(samples.T).astype(dtype).tobytes())
            output.flush()
    except BrokenPipeError:  # the player has stopped
        arguments.discard_output()


def _wav_header(sample_rate: int, num_channels: int) -> bytes:
    """The header of a 16-bit WAV of unknown length, as players of streams accept it."""
    import struct

    unknown_size = 2**32 - 1
    frame_bytes = 2 * num_channels
    layout = struct.pack(
        "<4sIHHIIHH", b"fmt ", 16, 1, num_channels, sample_rate, sample_rate * frame_bytes,
        frame_bytes, 16,
    )  # fmt: skip
    riff = struct.pack("<4sI4s", b"RIFF", unknown_size, b"WAVE")
    data = struct.pack("<4sI", b"data", unknown_size)
    return riff + layout + data
