"""Serves a page on this machine that reconstructs audio files and the microphone, and speaks texts.

The page loads nothing from elsewhere and works without a network.
"""

import argparse

from moss_tok.cli import arguments

EXAMPLE = "moss-tok demo --port 7860"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    arguments.add_checkpoint(parser)
    parser.add_argument(
        "--speaker",
        metavar="RUN",
        help="checkpoint or training workdir of a speech model, for the tab Speak; the default of "
        "--checkpoint is then the codec in the settings of the workdir",
    )
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
    from moss_tok.demo.speech import Speaker

    with server.bind(args.port) as listener:
        checkpoint = args.checkpoint
        if args.speaker and not checkpoint:
            checkpoint = arguments.codec_of_run(args.speaker, "--checkpoint, its codec")
        codec = moss_tok.load(checkpoint)
        speaker = Speaker.load(args.speaker, codec) if args.speaker else None
        name = Path(checkpoint).name if checkpoint else "the codec in moss_tok"
        note = "" if checkpoint else assets.NOTE
        address = "http://{}:{}/".format(*listener.getsockname())
        print(f"open {address} in a browser; Ctrl+C ends the demo", flush=True)
        server.run(server.Demo(codec, name, note, speaker), listener)
