"""Serves a page on this machine that reconstructs audio files and the microphone.

The page loads nothing from elsewhere and works without a network.
"""

import argparse

from moss_tok.cli import arguments

EXAMPLE = "moss-tok demo --port 7860"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    arguments.add_checkpoint(parser)
    parser.add_argument(
        "--port",
        type=int,
        default=7860,
        metavar="N",
        help="port on 127.0.0.1; 0: any free port (default: 7860)",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from pathlib import Path

    import moss_tok
    from moss_tok import assets, extras

    if extras.missing("demo"):
        raise ValueError(f"the demo needs the extra: {extras.install('demo')}")

    from moss_tok.demo import server

    with server.bind(args.port) as listener:
        codec = moss_tok.load(args.checkpoint)
        name = Path(args.checkpoint).name if args.checkpoint else "the codec in moss_tok"
        note = "" if args.checkpoint else assets.NOTE
        address = "http://{}:{}/".format(*listener.getsockname())
        print(f"open {address} in a browser; Ctrl+C ends the demo", flush=True)
        server.run(codec, name, note, listener)
