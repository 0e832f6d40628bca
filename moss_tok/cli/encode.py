"""Encodes an audio file, or all of a folder, to codes."""

import argparse
import functools
from pathlib import Path
from typing import Any

from moss_tok.cli import arguments

EXAMPLE = "moss-tok encode speech.flac speech.npz --num-quantizers 8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    arguments.add_audio_input(parser)
    parser.add_argument(
        "output",
        metavar="OUT.npz",
        help="codes, int16 [Q, T], with the fields that decode needs; for a folder: a folder",
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
        files.duration_seconds(source)  # reports unreadable audio before weights are loaded
    codec = moss_tok.load(args.checkpoint, component="encoder")
    num_quantizers = codec.config.check_num_quantizers(args.num_quantizers)
    encode = functools.partial(_encode, codec, num_quantizers)
    suffixes = (*files.readable_suffixes(), ".npz")
    return arguments.each_file(args.input, args.output, suffixes, encode)


def _encode(codec: Any, num_quantizers: int, source: Path, output: Path) -> str:
    from moss_tok.audio import files
    from moss_tok.codec import codes, inference

    config = codec.config
    seconds = files.duration_seconds(source)
    if not inference.is_long(seconds):
        wav = files.read(source, config.sample_rate, config.num_channels)
        num_samples = wav.shape[1]
        array = inference.encode_one(codec, wav, num_quantizers)
    else:
        array, num_samples = _encode_in_chunks(codec, num_quantizers, source, seconds)
    codes.write(output, array, num_samples, codec)
    return (
        f"{output}: {num_quantizers} x {array.shape[1]} codes, "
        f"{num_samples / config.sample_rate:.2f} s at {config.bitrate(num_quantizers):.0f} bit/s"
    )


def _encode_in_chunks(
    codec: Any, num_quantizers: int, source: Path, seconds: float
) -> tuple[Any, int]:
    """Codes [Q, T] int16 of a long recording, and its length in samples."""
    import numpy as np

    import moss_tok
    from moss_tok.audio import files
    from moss_tok.codec import inference

    config = codec.config
    num_samples = 0

    def blocks():
        nonlocal num_samples
        for block in files.read_blocks(
            source, config.sample_rate, config.num_channels, inference.CHUNK_SECONDS
        ):
            num_samples += block.shape[1]
            yield block

    frames = inference.chunk_frames(config)
    with moss_tok.EncoderStream(codec, num_quantizers, 1, [frames], blocks()) as stream:
        parts = arguments.progress(stream, seconds, inference.CHUNK_SECONDS)
        array = np.concatenate([part.astype(np.int16) for part in parts], axis=1)
    return array, num_samples
