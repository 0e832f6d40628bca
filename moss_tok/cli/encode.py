"""Encodes an audio file into codes."""

import argparse

from moss_tok.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("input", metavar="IN", help="wav, flac, ogg or mp3; any rate, any channels")
    parser.add_argument("output", metavar="OUT.npz", help="codes int16 [Q, T] and how to decode")
    arguments.add_codec(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    import numpy as np

    import moss_tok
    from moss_tok.audio import files
    from moss_tok.codec import codes

    if not args.output.endswith(".npz"):
        raise ValueError(f"{args.output}: the name must end in .npz")
    files.check_parent(args.output)
    seconds = files.duration_seconds(args.input)
    codec = moss_tok.load(args.checkpoint, component="encoder")
    config = codec.config
    num_quantizers = config.check_num_quantizers(args.num_quantizers)
    frames = arguments.chunk_frames(config, seconds)
    block_seconds, lengths = frames / config.frame_rate, []

    def blocks():
        for block in files.read_blocks(
            args.input, config.sample_rate, config.num_channels, block_seconds
        ):
            lengths.append(block.shape[1])
            yield block

    with moss_tok.EncoderStream(codec, num_quantizers, 1, [frames], blocks()) as stream:
        found = np.concatenate(list(arguments.progress(stream, seconds, block_seconds)), axis=1)
    codes.write(args.output, found, sum(lengths), config)
    print(
        f"{args.output}: {num_quantizers} x {found.shape[1]} codes, "
        f"{sum(lengths) / config.sample_rate:.2f} s at {config.bitrate(num_quantizers):.0f} bit/s"
    )
