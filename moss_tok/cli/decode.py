"""Decodes codes into an audio file."""

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

from moss_tok.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("input", metavar="IN.npz", help="codes, as `moss-tok encode` writes them")
    parser.add_argument("output", metavar="OUT.wav", help="wav, flac or ogg")
    arguments.add_codec(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    import moss_tok
    from moss_tok.audio import files
    from moss_tok.codec import codes

    files.check_output(args.output)
    codec = moss_tok.load(args.checkpoint, component="decoder")
    config = codec.config
    file = codes.read(args.input, config)
    given = file.codes.shape[0]
    config.check_num_quantizers(args.num_quantizers)
    if args.num_quantizers is not None and args.num_quantizers > given:
        raise ValueError(f"num_quantizers must be 1..{given}, the file has no more")
    rows = file.codes[: args.num_quantizers]
    num_quantizers, num_frames = rows.shape
    seconds = file.num_samples / config.sample_rate
    frames = arguments.chunk_frames(config, seconds)
    blocks = (rows[:, start : start + frames] for start in range(0, num_frames, frames))
    with moss_tok.DecoderStream(codec, num_quantizers, 1, [frames], blocks) as stream:
        parts = arguments.progress(stream, seconds, frames / config.frame_rate)
        wav = _first(parts, file.num_samples)
        files.write_blocks(args.output, wav, config.sample_rate, config.num_channels)
    print(f"{args.output}: {seconds:.2f} s from {num_quantizers} x {num_frames} codes")


def _first(blocks: Iterable[Any], num_samples: int) -> Iterator[Any]:
    """Cuts the end of blocks [C, S] off."""
    for block in blocks:
        yield block[:, :num_samples]
        num_samples = max(0, num_samples - block.shape[1])
