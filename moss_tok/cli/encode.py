"""Encodes an audio file, or all of a folder, into codes."""

import argparse
import functools
from pathlib import Path
from typing import Any

from moss_tok.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "input", metavar="IN", help="audio of any kind, rate and channels; or a folder"
    )
    parser.add_argument(
        "output", metavar="OUT.npz", help="codes int16 [Q, T] and how to decode; or a folder"
    )
    arguments.add_codec(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    import moss_tok
    from moss_tok import storage
    from moss_tok.audio import files

    source = storage.to_local_path(args.input)
    if source.is_file():
        if not args.output.endswith(".npz"):
            raise ValueError(f"{args.output}: the name must end in .npz")
        files.check_parent(args.output)
    if not source.is_dir():
        files.duration_seconds(source)  # before the weights are read
    codec = moss_tok.load(args.checkpoint, component="encoder")
    num_quantizers = codec.config.check_num_quantizers(args.num_quantizers)
    encode = functools.partial(_encode, codec, num_quantizers)
    return arguments.each_file(
        args.input, args.output, (*files.readable_suffixes(), ".npz"), encode
    )


def _encode(codec: Any, num_quantizers: int, source: Path, output: Path) -> str:
    import numpy as np

    import moss_tok
    from moss_tok.audio import files
    from moss_tok.codec import codes, inference

    config, seconds, lengths = codec.config, files.duration_seconds(source), []
    frames, shape = arguments.chunk_frames(config), (config.sample_rate, config.num_channels)

    def blocks():
        for block in files.read_blocks(source, *shape, inference.CHUNK_SECONDS):
            lengths.append(block.shape[1])
            yield block

    if seconds <= inference.CHUNK_SECONDS:
        wav = files.read(source, *shape)
        lengths.append(wav.shape[1])
        found = inference.encode_one(codec, wav, num_quantizers)
    else:
        with moss_tok.EncoderStream(codec, num_quantizers, 1, [frames], blocks()) as stream:
            parts = arguments.progress(stream, seconds, inference.CHUNK_SECONDS)
            found = np.concatenate([part.astype(np.int16) for part in parts], axis=1)
    codes.write(output, found, sum(lengths), config)
    return (
        f"{output}: {num_quantizers} x {found.shape[1]} codes, "
        f"{sum(lengths) / config.sample_rate:.2f} s at {config.bitrate(num_quantizers):.0f} bit/s"
    )
