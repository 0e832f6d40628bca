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
    import moss_tok
    from moss_tok.audio import files
    from moss_tok.cli import codes

    if not args.output.endswith(".npz"):
        raise ValueError(f"{args.output}: the name must end in .npz")
    files.check_parent(args.output)
    codec = moss_tok.load(args.checkpoint, component="encoder")
    config = codec.config
    num_quantizers = config.check_num_quantizers(args.num_quantizers)
    wav = files.read(args.input, config.sample_rate, config.num_channels)
    encoded = moss_tok.encode(codec, wav[None], num_quantizers=num_quantizers)
    codes.write(args.output, encoded.codes[0], wav.shape[-1], config)
    print(
        f"{args.output}: {num_quantizers} x {encoded.codes.shape[-1]} codes, "
        f"{wav.shape[-1] / config.sample_rate:.2f} s at "
        f"{config.bitrate(num_quantizers):.0f} bit/s"
    )
