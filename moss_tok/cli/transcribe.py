"""Transcribes audio or codes, with a checkpoint that has a language model."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moss_tok.cli import arguments

EXAMPLE = "moss-tok transcribe speech.flac --checkpoint runs/asr"

_CODES = ".npz"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "input",
        metavar="IN",
        help="audio, or codes (.npz) written by moss-tok encode; or a folder of either, for which "
        "each line is the file's name, a tab and the text",
    )
    arguments.add_codec(parser, required=True)
    parser.add_argument(
        "--task",
        default="transcribe",
        metavar="T",
        help="transcribe, transcribe_speakers or caption (default: transcribe)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=512,
        metavar="N",
        help="maximum number of tokens of a text (default: 512)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0 takes the likeliest token; above 0, tokens are sampled (default: 0)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="sample among the K likeliest tokens (default: all)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample among the likeliest tokens whose probabilities sum to P (default: 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from moss_tok import storage
    from moss_tok.audio import files, folders
    from moss_tok.audio.manifest import TASKS
    from moss_tok.errors import check_choice
    from moss_tok.language.generate import Sampling

    check_choice("task", args.task, TASKS)
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"seed must be 0..{2**31 - 1}, got {args.seed}")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.max_tokens)
    source = storage.to_local_path(args.input)
    paths = [source]
    if source.is_dir():
        suffixes = (*files.readable_suffixes(), _CODES)
        paths = folders.select(source, storage.files_under(source), suffixes)
    elif not source.exists():
        raise ValueError(f"{source}: no such file")
    codec, language = _load(args, paths)
    if not source.is_dir():
        print(_transcribe(codec, language, source, args, sampling))
        return 0
    failures = []
    for path in paths:
        try:
            text = _transcribe(codec, language, path, args, sampling)
        except (ValueError, OSError) as error:
            failures.append(arguments.named_error(error, path))
        else:
            name = str(path.relative_to(source)).replace("\n", "\\n").replace("\t", "\\t")
            print(f"{name}\t{' '.join(text.split())}", flush=True)
    arguments.print_failures(failures)
    return 1 if failures else 0


def _load(args: argparse.Namespace, paths: Sequence[Path]) -> tuple[Any, Any]:
    """Loads the language model, and the part of the codec that the files need."""
    from moss_tok.codec import pretrained
    from moss_tok.language import pretrained as language_models

    language = language_models.load(args.checkpoint)
    if args.num_quantizers is not None and language.config.audio != "codes":
        raise ValueError("num-quantizers does not apply: this language model takes latents")
    only_codes = all(path.suffix.lower() == _CODES for path in paths)
    component = "quantizer" if only_codes else "encoder"
    codec = pretrained.load(args.checkpoint, component=component)
    codec.config.check_num_quantizers(args.num_quantizers)
    return codec, language


def _transcribe(
    codec: Any, language: Any, path: Path, args: argparse.Namespace, sampling: Any
) -> str:
    from moss_tok.audio import files
    from moss_tok.codec import codes
    from moss_tok.language import generate

    if path.suffix.lower() != _CODES:
        wav = files.read(path, codec.config.sample_rate, codec.config.num_channels)
        return generate.transcribe_wavs(
            codec, language, [wav], args.num_quantizers, args.task, sampling, args.seed
        )[0]
    rows = codes.read(path, codec).codes
    if args.num_quantizers is not None and args.num_quantizers > len(rows):
        raise ValueError(
            f"{path}: num_quantizers must be 1..{len(rows)} for this file, "
            f"got {args.num_quantizers}"
        )
    return generate.transcribe(
        codec, language, rows[None], None, args.task, sampling, args.seed, args.num_quantizers
    )[0]
