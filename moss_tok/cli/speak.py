"""Speaks a text, or each text of a file, with a checkpoint of a speech model."""

import argparse
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moss_tok.cli import arguments

EXAMPLE = 'moss-tok speak "four seven two" speech.wav --checkpoint runs/tts'

LISTS = (".txt", ".jsonl", ".lst")
_PCM = {"s16": ("<i2", 32768), "f32": ("<f4", 1)}  # type, full scale
_STDOUT = "-"
_AT_ONCE = 64  # texts between two lots of files


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
        "while the speech is sampled",
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
        type=float,
        default=1.0,
        metavar="X",
        help="temperature of the codes; 0 takes the likeliest (default: 1)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=50,
        metavar="K",
        help="sample codes among the K likeliest; 0: all (default: 50)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="sample codes among the likeliest whose probabilities sum to P (default: 0.95)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.1,
        metavar="X",
        help="penalty of codes that occurred before; 1: none (default: 1.1)",
    )


@dataclasses.dataclass(frozen=True)
class _Row:
    """A text to say, and the name of its file."""

    name: str
    text: str
    prompt: str = ""
    prompt_text: str = ""
    details: dict[str, str] = dataclasses.field(default_factory=dict)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    is_list = Path(args.text).suffix.lower() in LISTS and Path(args.text).is_file()
    sampling = _sampling(args)
    _check_output(args, is_list)
    rows = [_Row("", args.text, args.prompt or "", args.prompt_text)]
    if is_list:
        rows = _read_list(args)
    speech, codec = _load(args)
    requests = _requests(speech, codec, rows, is_list)
    if is_list:
        _speak_list(args, speech, codec, rows, requests, sampling)
    elif args.output == _STDOUT:
        _speak_to_stdout(args, speech, codec, requests[0], sampling)
    else:
        _speak_to_file(args, speech, codec, requests[0], sampling)


def _sampling(args: argparse.Namespace) -> Any:
    from moss_tok.speech.sampling import DEFAULT, Channel, Sampling
    from moss_tok.speech.speaking import MAX_SEED

    if not 0 <= args.seed <= MAX_SEED:
        raise ValueError(f"seed must be 0..{MAX_SEED}, got {args.seed}")
    if args.prompt_text and not args.prompt:
        raise ValueError("prompt-text needs --prompt, the recording in which it is said")
    channel = Channel(args.temperature, args.top_k, args.top_p, args.repetition_penalty)
    return Sampling(DEFAULT.text, channel, channel)


def _check_output(args: argparse.Namespace, is_list: bool) -> None:
    from moss_tok.audio import files

    if is_list and (args.output == _STDOUT or Path(args.output).is_file()):
        raise ValueError(f"{args.output}: the output of a file of texts must be a folder")
    if args.pcm and args.output != _STDOUT:
        raise ValueError("pcm is for standard output, as in: moss-tok speak TEXT - --pcm s16")
    if not is_list and args.output != _STDOUT:
        files.check_output(args.output)
    if args.prompt and not Path(args.prompt).is_file():
        raise ValueError(f"{args.prompt}: no such file")


def _read_list(args: argparse.Namespace) -> list[_Row]:
    """The texts of a file; ValueError names a bad line, or two rows with the same name."""
    from moss_tok import json_files

    path = Path(args.text)
    rows = []
    for number, line in enumerate(json_files.read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = _PARSERS[path.suffix.lower()](line, f"{number:04}", path.parent)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        if not row.prompt and args.prompt:
            row = dataclasses.replace(row, prompt=args.prompt, prompt_text=args.prompt_text)
        if row.prompt and not Path(row.prompt).is_file():
            raise ValueError(f"{path}:{number}: {row.prompt}: no such file")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no lines")
    names: set[str] = set()
    for row in rows:
        if row.name in names:
            raise ValueError(f"{path}: two lines have the id {row.name!r}")
        names.add(row.name)
    return rows


def _parse_text(line: str, name: str, folder: Path) -> _Row:
    del folder
    return _Row(name, line.strip())


def _parse_object(line: str, name: str, folder: Path) -> _Row:
    from moss_tok.json_files import parse_json_object
    from moss_tok.speech.layout import FORM

    fields = parse_json_object(line)
    name = _check_name(str(fields.pop("id", name)))
    values = {}
    for key in ("text", "prompt", "prompt_text", *FORM):
        value = fields.pop(key, None)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{key} must be a text, got {value!r}")
        if value is not None:
            values[key] = value
    if fields:
        accepted = ", ".join(("id", "text", "prompt", "prompt_text", *FORM))
        raise ValueError(f"unknown key {next(iter(fields))!r}; accepted: {accepted}")
    if "text" not in values:
        raise ValueError("text is missing")
    prompt = str(folder / values.pop("prompt")) if "prompt" in values else ""
    text, prompt_text = values.pop("text"), values.pop("prompt_text", "")
    return _Row(name, text, prompt, prompt_text, values)


def _parse_seed_line(line: str, name: str, folder: Path) -> _Row:
    """A line of a meta.lst: id|text of the prompt|prompt|text[|recording]."""
    parts = line.strip().split("|")
    if len(parts) not in (4, 5):
        raise ValueError(f"must be id|text of the prompt|prompt|text, got {line.strip()[:60]!r}")
    name, prompt_text, prompt, text = parts[:4]
    return _Row(_check_name(name), text, str(folder / prompt), prompt_text)


_PARSERS = {".txt": _parse_text, ".jsonl": _parse_object, ".lst": _parse_seed_line}


def _check_name(name: str) -> str:
    if not name or name.startswith(".") or set(name) & set("/\\\0"):
        raise ValueError(f"id must be a file's name, got {name!r}")
    return name


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The speech model and its codec."""
    import moss_tok
    from moss_tok.speech import generate, pretrained, speaking

    speech = pretrained.load(args.checkpoint)
    generate.check_num_quantizers(speech.config, args.num_quantizers)
    codec = moss_tok.load(args.codec or arguments.codec_of_run(args.checkpoint, "--codec"))
    speaking.check_codec(speech.config, codec)
    return speech, codec


def _requests(speech: Any, codec: Any, rows: list[_Row], is_list: bool) -> list[Any]:
    """What to say; ValueError names a row that cannot be said."""
    from moss_tok.speech import generate, layout, speaking

    prompts: dict[str, Any] = {}
    requests = []
    for row in rows:
        try:
            layout.check_text(speech.config, speech.tokenizer, row.text)
            request = layout.Request(row.text, details=row.details)
            if row.prompt:
                if row.prompt not in prompts:
                    prompts[row.prompt] = speaking.encode_prompt(codec, row.prompt)
                request = speaking.with_prompt(
                    speech.config, row.text, prompts[row.prompt], row.prompt_text, **row.details
                )
            generate.check_request(speech, request)
        except ValueError as error:
            where = f"{row.name}: " if is_list else ""
            raise ValueError(f"{where}{error}") from error
        requests.append(request)
    return requests


def _speak_list(
    args: argparse.Namespace,
    speech: Any,
    codec: Any,
    rows: list[_Row],
    requests: list[Any],
    sampling: Any,
) -> None:
    import sys

    from moss_tok import storage
    from moss_tok.audio import files
    from moss_tok.speech import speaking

    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    storage.check_writable(folder)
    cut = []
    with arguments.counter(len(rows), args.text) as count:
        for start in range(0, len(rows), _AT_ONCE):
            part = requests[start : start + _AT_ONCE]
            spoken = speaking.speak(
                speech, codec, part, sampling, args.seed, args.num_quantizers, start
            )
            for row, result in zip(rows[start:], spoken, strict=False):
                files.write(folder / f"{row.name}.wav", result.wav, codec.config.sample_rate)
                if not result.ended:
                    cut.append(row.name)
                count()
    _write_listing(folder, rows)
    print(f"{folder}: {len(rows)} files")
    if cut:
        print(f"cut at the longest length for their texts: {', '.join(cut)}", file=sys.stderr)


def _write_listing(folder: Path, rows: list[_Row]) -> None:
    """Writes meta.lst, with which the scripts of Seed-TTS-eval find what each file says."""
    from moss_tok.audio import files

    lines = []
    for row in rows:
        prompt = str(Path(row.prompt).absolute()) if row.prompt else ""
        fields = (row.name, row.prompt_text, prompt, row.text)
        lines.append("|".join(" ".join(field.split()) for field in fields) + "\n")
    files.write_text(folder / "meta.lst", "".join(lines))


def _stream(
    args: argparse.Namespace, speech: Any, codec: Any, request: Any, sampling: Any
) -> Iterator[Any]:
    """Blocks of audio, with a progress bar."""
    from moss_tok.speech import speaking

    blocks = speaking.stream(speech, codec, request, sampling, args.seed, args.num_quantizers)
    return arguments.progress(blocks, 0.0, 1 / codec.config.frame_rate)


def _speak_to_file(
    args: argparse.Namespace, speech: Any, codec: Any, request: Any, sampling: Any
) -> None:
    from moss_tok.audio import files

    config = codec.config
    num_samples = 0

    def counted(blocks: Iterable[Any]) -> Iterator[Any]:
        nonlocal num_samples
        for block in blocks:
            num_samples += block.shape[1]
            yield block

    blocks = counted(_stream(args, speech, codec, request, sampling))
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
    except BrokenPipeError:  # the player has gone
        arguments.discard_output()


def _wav_header(sample_rate: int, num_channels: int) -> bytes:
    """The header of a 16-bit WAV of unknown length, as players of streams accept it."""
    import struct

    unknown = 2**32 - 1
    frame_bytes = 2 * num_channels
    layout = struct.pack(
        "<4sIHHIIHH", b"fmt ", 16, 1, num_channels, sample_rate, sample_rate * frame_bytes,
        frame_bytes, 16,
    )  # fmt: skip
    head = struct.pack("<4sI4s", b"RIFF", unknown, b"WAVE")
    return head + layout + struct.pack("<4sI", b"data", unknown)
