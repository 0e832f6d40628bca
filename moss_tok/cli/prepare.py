"""Prepares a folder or manifest for training: ArrayRecord shards, a manifest and a summary."""

import argparse
import os


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("input", metavar="IN", help="folder of audio, or manifest.jsonl")
    parser.add_argument("output", metavar="OUT", help="folder; one left unfinished is gone on with")
    parser.add_argument(
        "--sample-rate", type=int, default=0, metavar="HZ", help="resample (default: as it is)"
    )
    parser.add_argument(
        "--num-shards", type=int, default=0, metavar="N", help="per split (default: by length)"
    )
    parser.add_argument(
        "--shard-hours", type=float, default=2.0, metavar="H", help="audio per shard (default: 2)"
    )
    parser.add_argument(
        "--min-seconds", type=float, default=0.1, metavar="S", help="reject shorter ones (0.1)"
    )
    parser.add_argument(
        "--max-seconds", type=float, default=60.0, metavar="S",
        help="cut longer ones that have no transcript (60)",
    )  # fmt: skip
    parser.add_argument(
        "--num-workers", type=int, default=os.cpu_count(), metavar="N", help="processes (all cores)"
    )
    parser.add_argument(
        "--runner", default="", help="run as an Apache Beam pipeline: DirectRunner, FlinkRunner"
    )
    parser.add_argument(
        "--beam-flags", default="", metavar="FLAGS",
        help="flags of the runner in quotes: '--project=P --region=R'",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    import shlex
    from pathlib import Path

    from moss_tok.cli import arguments
    from moss_tok.data import prepare

    if args.num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {args.num_workers}")
    if args.beam_flags and not args.runner:
        raise ValueError("--beam-flags is for Beam: give --runner too")
    settings = prepare.Settings(
        args.sample_rate, args.num_shards, args.shard_hours, args.min_seconds, args.max_seconds
    )
    shards = prepare.begin(args.input, args.output, settings)
    folder = Path(args.output).absolute()
    total = sum(len(shard.items) for shard in shards)
    print(f"{total} files into {len(shards)} shards", flush=True)
    if args.runner:
        prepare.run_beam(folder, shards, settings, args.runner, shlex.split(args.beam_flags))
    else:
        work = prepare.run_local(folder, shards, settings, min(args.num_workers, len(shards)))
        with arguments.counter(total, args.output) as count:
            for _ in work:
                count()
    summary = prepare.finish(args.output, shards)
    for domain, hours in summary["hours"].items():
        print(f"{domain:<12} {hours:10.2f} h")
    for reason, count in summary["rejected"].items():
        print(f"rejected: {count} files, {reason} (see rejected.jsonl)")
    print(f"{args.output}: {summary['records']} records in {summary['shards']} shards")
