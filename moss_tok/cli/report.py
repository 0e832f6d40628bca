"""A page to look and listen: report.html of a training run, or of an evaluation."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("folder", metavar="DIR", help="workdir of train.py, or output of evaluate")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from pathlib import Path

    from moss_tok.evaluation import pages

    folder = Path(args.folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    write = pages.write_run if (folder / "train_config.json").exists() else pages.write_evaluation
    print(write(folder))
