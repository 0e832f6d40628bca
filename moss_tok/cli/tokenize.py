"""Encodes a data set to shards of codes: in batches, resumable, on one or several machines."""

import argparse
from typing import Any

from moss_tok.cli import arguments

EXAMPLE = "moss-tok tokenize recordings --output codes --num-quantizers 16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "input",
        metavar="IN",
        help="folder of audio, manifest.jsonl or ArrayRecord shards; may be a gs:// path",
    )
    arguments.add_codec(parser)
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder on this machine, which machines that share the work also share; an unfinished "
        "output is resumed by the same command",
    )
    parser.add_argument(
        "--format", default="arrayrecord", help="arrayrecord or jsonl (default: arrayrecord)"
    )
    parser.add_argument(
        "--precision",
        default="highest",
        help="highest gives the codes of moss-tok encode; high and bfloat16 are faster, and some "
        "codes differ (default: highest)",
    )
    parser.add_argument(
        "--shard-index",
        type=int,
        metavar="I",
        help="index of this machine, 0 .. N - 1; it writes every N-th shard",
    )
    parser.add_argument(
        "--num-shards",
        type=int,
        metavar="N",
        help="number of machines that share the work (default: the processes of jax.distributed)",
    )
    _add_sizes(parser)


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-hours",
        type=float,
        default=5.0,
        metavar="H",
        help="hours of audio per shard (default: 5)",
    )
    parser.add_argument(
        "--batch-seconds",
        type=float,
        default=120.0,
        metavar="S",
        help="seconds of audio per batch and device, padding included (default: 120)",
    )
    parser.add_argument(
        "--num-workers",
        type=int,
        default=4,
        metavar="N",
        help="number of threads that read audio (default: 4)",
    )
    parser.add_argument(
        "--verify",
        type=int,
        default=0,
        metavar="N",
        help="when all shards are written, encode N items again, each alone, and print how many "
        "codes differ (default: 0)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    import moss_tok
    from moss_tok.codec import pretrained
    from moss_tok.data import jobs, tokenize
    from moss_tok.data.config import PLAN
    from moss_tok.errors import check_choice
    from moss_tok.nn.compute import PRECISIONS

    check_choice("precision", args.precision, tuple(PRECISIONS))
    distributed, shard_index, num_shards = _shard(args)
    tokenize.check_share(shard_index, num_shards)
    if args.verify < 0:
        raise ValueError(f"verify must be at least 0, got {args.verify}")
    config = pretrained.load_config(args.checkpoint)
    settings = tokenize.Settings(
        num_quantizers=config.check_num_quantizers(args.num_quantizers),
        format=args.format,
        shard_hours=args.shard_hours,
        batch_seconds=args.batch_seconds,
        num_workers=args.num_workers,
    )
    jobs.check_folder(args.output, PLAN)
    items = tokenize.find_items(args.input)
    compute = PRECISIONS[args.precision]
    codec = moss_tok.load(args.checkpoint, component="encoder", compute=compute)
    if distributed:
        tokenize.check_shared(args.output)
    plan = tokenize.make_plan(codec, items, args.output, settings)
    seconds = sum(item.duration_seconds for _, item in items)
    print(f"{len(items)} recordings, {seconds / 3600:.2f} h, {len(plan.shards)} shards", flush=True)
    with arguments.meter(seconds / num_shards) as progress:
        statistics = tokenize.run(codec, plan, shard_index, num_shards, progress)
    _print_statistics(statistics)
    summary = tokenize.wait(plan) if distributed else tokenize.finish(plan)
    if summary is None:
        print(f"{args.output}: this machine's shards are written, those of others are not")
        return 0
    if args.verify:
        # Processes of jax.distributed end together, so each verifies its share.
        share = (shard_index, num_shards) if distributed else (0, 1)
        _verify(codec, plan, args.verify, share)
    print(
        f"{args.output}: {summary['num_items']} items, {summary['num_frames']} frames; "
        f"{summary['num_failures']} failures (failures.jsonl)"
    )
    return 0 if summary["num_items"] else 1


def _shard(args: argparse.Namespace) -> tuple[bool, int, int]:
    """Whether the processes of jax.distributed share the work, the shard index and count."""
    import jax

    from moss_tok import sharding

    if (args.shard_index is None) != (args.num_shards is None):
        raise ValueError("--shard-index and --num-shards must be given together")
    if args.num_shards is not None:
        return False, args.shard_index, args.num_shards
    sharding.connect("", 1, 0)
    return True, jax.process_index(), jax.process_count()


def _print_statistics(statistics: Any) -> None:
    if not statistics.audio_seconds:
        return
    padding = statistics.padded_seconds / statistics.audio_seconds - 1
    idle = 1 - statistics.device_seconds / statistics.seconds
    print(
        f"{statistics.audio_seconds:.0f} s of audio in {statistics.seconds:.0f} s; "
        f"padding {padding:.1%}, device idle {idle:.0%}"
    )


def _verify(codec: Any, plan: Any, num_items: int, share: tuple[int, int]) -> None:
    from moss_tok.data import tokenize

    num_checked = 0
    total_different = 0
    for name, num_different, num_codes in tokenize.verify(codec, plan, num_items, share):
        num_checked += 1
        total_different += num_different
        print(
            f"{name}: {num_different} of {num_codes} codes differ from encoding it alone",
            flush=True,
        )
    print(f"verified {num_checked} items, {total_different} codes differ")
