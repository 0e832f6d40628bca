"""Scaling studies: trains the points of a study, and writes its table and plot.

    python experiments/scaling/study.py sizes --train_data=data/manifest.jsonl

Studies: `sizes` (loss against parameters and compute, with power laws), `joint` (end to end
against a frozen encoder and quantizer), `dropout` (quantizer dropout), `batch` (batch size),
`streams` (type of the residual streams of a deep model). Each point is a run of train.py in its own
folder of --out. If interrupted, run the same command again: finished points are not run again, the
others resume. With a larger --num_steps, the points continue from where they ended. It prints and
writes OUT/STUDY.md and OUT/STUDY.png.
"""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import points as all_points
import report
from points import STUDIES, Point

from moss_tok import checkpoint
from moss_tok.audio import files
from moss_tok.errors import exit_code

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
STARTER = FOLDER.parent / "starter" / "manifest.jsonl"
FLAGS = "point.json"
MAY_GROW = ("num_steps", "checkpoint_every", "keep_every")  # flags of a longer study

# Runs a command and appends what it prints to a file; returns the exit code.
Runner = Callable[[Sequence[str], Path], int]


def run_command(command: Sequence[str], log: Path) -> int:
    """See `Runner`."""
    with open(log, "a") as file:
        return subprocess.run(command, stdout=file, stderr=file, check=False).returncode


def complete(
    study: Sequence[Point], out: Path, train_data: str, run: Runner = run_command
) -> dict[Point, dict[str, Any]]:
    """Runs the points that are not finished; returns the results of all.

    Args:
      study: The points; one that others start from comes before them.
      out: Folder of all points.
      train_data: The flag of train.py.
      run: Runs a command.

    Raises:
      ValueError: A run failed, or a point in `out` was made with other settings.
    """
    all_points.write_models(out)
    results = {}
    for number, point in enumerate(study):
        workdir = out / point.name
        flags = point.flags(out, train_data)
        check_flags(workdir, flags)
        path = workdir / f"heldout-{point.num_steps}.json"
        if not path.exists():
            print(f"point {number + 1} of {len(study)}: {point.name}", flush=True)
            _run_point(workdir, flags, path, run)
        results[point] = json.loads(path.read_text())
    return results


def check_flags(workdir: Path, flags: dict[str, str]) -> None:
    """Writes the flags of a point into its folder; ValueError if another point is there."""
    path = workdir / FLAGS
    before = json.loads(path.read_text()) if path.exists() else flags
    changed = []
    for name in before | flags:
        if before.get(name) != flags.get(name) and name not in MAY_GROW:
            changed.append(name)
    if changed:
        raise ValueError(
            f"{workdir} was made with another {', '.join(changed)}: choose another --out"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(flags, indent=2) + "\n")


def _run_point(workdir: Path, flags: dict[str, str], result: Path, run: Runner) -> None:
    given = [f"--{name}={value}" for name, value in flags.items()]
    train = [
        sys.executable, str(ROOT / "train.py"), f"--flagfile={FOLDER / 'base.flags'}", *given,
        f"--workdir={workdir}", f"--compilation_cache_dir={workdir.parent / 'compiled'}",
    ]  # fmt: skip
    measure = [
        sys.executable, str(FOLDER / "heldout.py"), str(workdir), str(result), flags["num_steps"],
    ]  # fmt: skip
    log = workdir / "log.txt"
    # A longer run has the checkpoint of a shorter one.
    trained = int(flags["num_steps"]) in checkpoint.saved_steps(workdir)
    for command in [measure] if trained else [train, measure]:
        code = run(command, log)
        if code:
            script = Path(command[1]).name
            raise ValueError(f"{script} ended with exit code {code}; see {log}")


def main(argv: Sequence[str] | None = None) -> int:
    """Completes a study and writes its report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--train_data", default=str(STARTER), help="the flag of train.py")
    parser.add_argument("--out", type=Path, default="runs/scaling", help="folder of all points")
    parser.add_argument("--num_steps", type=int, default=600, help="steps per point")
    parser.add_argument("--num_seeds", type=int, default=1, help="runs per setting")
    args = parser.parse_args(argv)

    def run() -> None:
        for name in ("num_steps", "num_seeds"):
            if getattr(args, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
        study = STUDIES[args.study](args.num_steps, args.num_seeds)
        results = complete(study, args.out, args.train_data)
        print(report.write(args.study, results, args.out))

    return exit_code(run)


def _end_with_children(*_: object) -> None:
    """Makes SIGTERM an exception, at which subprocess.run ends the command that it waits for."""
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end_with_children)
    sys.exit(main())
