"""Decodes a file of codes, or all of a folder, to audio."""

import argparse
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moss_tok.cli import arguments

EXAMPLE = "moss-tok decode speech.npz speech.wav"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "input", metavar="IN.npz", help="codes written by moss-tok encode, or a folder of them"
    )
    arguments.add_audio_output(parser)
    arguments.add_codec(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    import moss_tok

    arguments.check_audio_output(args.input, args.output)
    codec = moss_tok.load(args.checkpoint, component="decoder")
    codec.config.check_num_quantizers(args.num_quantizers)
    decode = functools.partial(_decode, codec, args.num_quantizers)
    return arguments.each_file(args.input, args.output, (".npz", ".wav"), decode)


def _decode(codec: Any, num_quantizers: int | None, source: Path, output: Path) -> str:
    import moss_tok
    from moss_tok.audio import files
    from moss_tok.codec import codes, inference

    config = codec.config
    file = codes.read(source, codec)
    available = file.codes.shape[0]
    if num_quantizers is not None and num_quantizers > available:
        raise ValueError(
            f"num_quantizers must be 1..{available} for this file, got {num_quantizers}"
        )
    rows = file.codes[:num_quantizers]
    num_quantizers, num_frames = rows.shape
    seconds = file.num_samples / config.sample_rate
    if not inference.is_long(seconds):
        wav = inference.decode_one(codec, rows)[:, : file.num_samples]
        files.write(output, wav, config.sample_rate)
    else:
        frames = inference.chunk_frames(config)
        blocks = (rows[:, start : start + frames] for start in range(0, num_frames, frames))
        with moss_tok.DecoderStream(codec, num_quantizers, 1, [frames], blocks) as stream:
            parts = arguments.progress(stream, seconds, inference.CHUNK_SECONDS)
            wav = _truncate(parts, file.num_samples)
            files.write_blocks(output, wav, config.sample_rate, config.num_channels, seconds)
    return f"{output}: {seconds:.2f} s from {num_quantizers} x {num_frames} codes"


def _truncate(blocks: Iterable[Any], num_samples: int) -> Iterator[Any]:
    """Yields blocks [C, S], cut to `num_samples` in total."""
    for block in blocks:
        yield block[:, :num_samples]
        num_samples = max(0, num_samples - block.shape[1])
