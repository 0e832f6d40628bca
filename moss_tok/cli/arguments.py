"""Arguments that several commands share."""

import argparse


def add_codec(parser: argparse.ArgumentParser) -> None:
    """--checkpoint and --num-quantizers."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="C",
        help="checkpoint, training workdir, official directory or Hub id",
    )
    parser.add_argument(
        "--num-quantizers",
        type=int,
        metavar="N",
        help="use the first N quantizers; fewer means a lower bitrate (default: all)",
    )
