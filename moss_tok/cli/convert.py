"""Converts official Hugging Face weights to a checkpoint, or a checkpoint to official weights."""

import argparse

EXAMPLE = "moss-tok convert runs/quickstart exported"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help="checkpoint, training workdir, official directory or Hugging Face Hub id",
    )
    parser.add_argument(
        "destination", metavar="DST", help="new directory, written in the other of the two formats"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "float16", "bfloat16"),
        help="type of the stored weights (default: float32)",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from moss_tok import convert

    kind = convert.convert(args.source, args.destination, args.dtype)
    names = {"checkpoint": "moss_tok checkpoint", "official": "official Hugging Face directory"}
    print(f"{args.destination}: {names[kind]}, {args.dtype}")
