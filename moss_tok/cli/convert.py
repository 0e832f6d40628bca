"""Converts official weights to a checkpoint, or a checkpoint to an official directory."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("source", metavar="SRC", help="official directory, Hub id or checkpoint")
    parser.add_argument("destination", metavar="DST", help="new directory; the other layout")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the stored weights"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from moss_tok import convert

    kind = convert.convert(args.source, args.destination, args.dtype)
    names = {"checkpoint": "moss_tok checkpoint", "official": "official Hugging Face directory"}
    print(f"{args.destination}: {names[kind]}, {args.dtype}")
