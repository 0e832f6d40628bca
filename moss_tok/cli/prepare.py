"""Prepares a folder or manifest of audio for training: ArrayRecord shards, manifest, summary."""

import argparse
import os
from typing import Any

EXAMPLE = "moss-tok prepare recordings shards --sample-rate 24000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "input", metavar="IN", help="folder of audio, or manifest.jsonl; may be a gs:// path"
    )
    parser.add_argument(
        "output", metavar="OUT", help="folder; an unfinished output is resumed by the same command"
    )
    parser.add_argument(
        "--sample-rate",
        type=int,
        default=0,
        metavar="HZ",
        help="resample to this rate (default: keep each file's rate)",
    )
    parser.add_argument(
        "--num-shards",
        type=int,
        default=0,
        metavar="N",
        help="number of shards per split (default: from --shard-hours)",
    )
    parser.add_argument(
        "--shard-hours",
        type=float,
        default=2.0,
        metavar="H",
        help="hours of audio per shard (default: 2)",
    )
    parser.add_argument(
        "--min-seconds",
        type=float,
        default=0.1,
        metavar="S",
        help="reject recordings shorter than this (default: 0.1)",
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="cut recordings without transcript or caption into parts of at most this length "
        "(default: 60)",
    )
    parser.add_argument(
        "--num-workers",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="number of processes (default: all cores)",
    )
    _add_beam(parser)


def _add_beam(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runner",
        default="",
        help="run as an Apache Beam pipeline, for example with DirectRunner or FlinkRunner",
    )
    parser.add_argument(
        "--beam-flags",
        default="",
        metavar="FLAGS",
        help="flags for the Beam runner, quoted: --beam-flags='--project=P --region=R'",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    import shlex

    from moss_tok.cli import arguments
    from moss_tok.data import prepare

    if args.num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {args.num_workers}")
    if args.beam_flags and not args.runner:
        raise ValueError("--beam-flags needs --runner")
    settings = prepare.Settings(
        args.sample_rate, args.num_shards, args.shard_hours, args.min_seconds, args.max_seconds
    )
    plan = prepare.make_plan(args.input, args.output, settings)
    print(f"{plan.num_items} files into {len(plan.shards)} shards", flush=True)
    if args.runner:
        prepare.run_beam(plan, args.runner, shlex.split(args.beam_flags))
    else:
        num_workers = min(args.num_workers, len(plan.shards))
        with arguments.counter(plan.num_items, args.output) as count:
            prepare.run_local(plan, num_workers, count)
    _print_summary(args.output, prepare.finish(plan))


def _print_summary(output: str, summary: dict[str, Any]) -> None:
    for domain, hours in summary["hours"].items():
        print(f"{domain:<12} {hours:10.2f} h")
    for reason, count in summary["rejected"].items():
        print(f"rejected: {count} files, {reason} (see rejected.jsonl)")
    print(f"{output}: {summary['records']} records in {summary['shards']} shards")
