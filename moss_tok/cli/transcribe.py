"""Prints what is said in audio, or in codes, by the language model of a checkpoint."""

import argparse
import sys
from pathlib import Path
from typing import Any

from moss_tok.cli import arguments

_CODES = ".npz"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "input",
        metavar="IN",
        help="audio, or codes (.npz) of `moss-tok encode`; or a folder of either, which prints "
        "NAME, a tab and the text",
    )
    arguments.add_codec(parser)
    parser.add_argument("--task", default="transcribe", metavar="T",
                        help="transcribe, transcribe_speakers or caption")  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N",
                        help="a text ends here at the latest (default: 512)")  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X",
                        help="above 0: tokens are drawn, not the likeliest taken")  # fmt: skip
    parser.add_argument("--top-k", type=int, default=0, metavar="K",
                        help="drawn among the K likeliest (default: all)")  # fmt: skip
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="drawn among the likeliest that make up P (default: 1)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the draws")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from moss_tok import storage
    from moss_tok.audio import files, folders
    from moss_tok.audio.manifest import TASKS
    from moss_tok.codec import pretrained
    from moss_tok.errors import check_choice
    from moss_tok.language import pretrained as language_models
    from moss_tok.language.generate import Sampling

    check_choice("task", args.task, TASKS)
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"seed must be 0..{2**31 - 1}, got {args.seed}")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.max_tokens)
    source, kinds = storage.to_local_path(args.input), (*files.readable_suffixes(), _CODES)
    paths = [source]
    if source.is_dir():
        paths = folders.select(source, storage.files_under(source), kinds)
    elif not source.exists():
        raise ValueError(f"{source}: no such file")
    language = language_models.load(args.checkpoint)
    if args.num_quantizers is not None and language.config.audio != "codes":
        raise ValueError("this language model hears latents, without any num-quantizers")
    coded = all(p.suffix.lower() == _CODES for p in paths)
    codec = pretrained.load(args.checkpoint, component="quantizer" if coded else "encoder")
    codec.config.check_num_quantizers(args.num_quantizers)
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
    for failure in failures:
        print(f"failed: {' '.join(failure.split())}", file=sys.stderr)
    return 1 if failures else 0


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
    rows = codes.read(path, codec.config).codes
    if args.num_quantizers is not None and args.num_quantizers > len(rows):
        raise ValueError(f"{path}: num_quantizers must be 1..{len(rows)}, the file has no more")
    options = (None, args.task, sampling, args.seed, args.num_quantizers)
    return generate.transcribe(codec, language, rows[None], *options)[0]
