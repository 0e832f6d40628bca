"""Writes report.html, a page with plots, audio and tables of a training run or an evaluation."""

import argparse

EXAMPLE = "moss-tok report runs/quickstart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "folder", metavar="DIR", help="workdir of train.py, or output of moss-tok evaluate"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from pathlib import Path

    from moss_tok.evaluation import pages

    folder = Path(args.folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    is_run = (folder / "train_config.json").exists()
    write = pages.write_run if is_run else pages.write_evaluation
    print(write(folder))
