"""Turns a data set into shards of codes: in batches, resumable, split over machines."""

import argparse

from moss_tok.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("input", metavar="INPUT", help="folder, manifest.jsonl, ArrayRecord shards")
    arguments.add_codec(parser)
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="one left unfinished is gone on with"
    )
    parser.add_argument("--format", default="arrayrecord", help="arrayrecord or jsonl")
    parser.add_argument(
        "--precision", default="highest",
        help="highest: the codes of `encode`; high, bfloat16: faster, some codes differ",
    )  # fmt: skip
    parser.add_argument(
        "--shard-index", type=int, metavar="I", help="this machine's part of the work, 0 .. N - 1"
    )
    parser.add_argument("--num-shards", type=int, metavar="N", help="parts of the work")
    parser.add_argument(
        "--shard-hours", type=float, default=5.0, metavar="H", help="audio per file written (5)"
    )
    parser.add_argument(
        "--batch-seconds", type=float, default=120.0, metavar="S",
        help="audio per batch and device (120)",
    )  # fmt: skip
    parser.add_argument(
        "--num-workers", type=int, default=4, metavar="N", help="threads that read (4)"
    )
    parser.add_argument(
        "--verify", type=int, default=0, metavar="N",
        help="at the end encode N items again, each alone, and print what differs",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    import jax

    import moss_tok
    from moss_tok import sharding
    from moss_tok.codec import pretrained
    from moss_tok.data import jobs, tokenize
    from moss_tok.data.config import PLAN
    from moss_tok.errors import check_choice
    from moss_tok.nn.compute import PRECISIONS

    check_choice("precision", args.precision, tuple(PRECISIONS))
    if (args.shard_index is None) != (args.num_shards is None):
        raise ValueError("--shard-index and --num-shards go together")
    together = args.num_shards is None  # processes of jax.distributed end together
    if together:
        sharding.connect("", 1, 0)
        args.shard_index, args.num_shards = jax.process_index(), jax.process_count()
    tokenize.check_share(args.shard_index, args.num_shards)
    if args.verify < 0:
        raise ValueError(f"verify must be at least 0, got {args.verify}")
    settings = tokenize.Settings(
        pretrained.load_config(args.checkpoint).check_num_quantizers(args.num_quantizers),
        args.format, args.shard_hours, args.batch_seconds, args.num_workers,
    )  # fmt: skip
    jobs.check_folder(args.output, PLAN)
    items = tokenize.find_items(args.input)
    compute = PRECISIONS[args.precision]
    codec = moss_tok.load(args.checkpoint, component="encoder", compute=compute)
    plan = tokenize.plan(codec, items, args.output, settings)
    seconds = sum(item.duration_seconds for _, item in items)
    print(f"{len(items)} recordings, {seconds / 3600:.2f} h, {len(plan.shards)} shards", flush=True)
    with arguments.meter(seconds / args.num_shards) as progress:
        done = tokenize.run(codec, plan, args.shard_index, args.num_shards, progress)
    if done.audio_seconds:
        print(f"{done.audio_seconds:.0f} s of audio in {done.seconds:.0f} s; padding "
              f"{done.padded_seconds / done.audio_seconds - 1:.1%}, device idle "
              f"{1 - done.device_seconds / done.seconds:.0%}")  # fmt: skip
    summary = tokenize.wait(plan) if together else tokenize.finish(plan)
    if summary is None:
        print(f"{args.output}: this part is done, others are not")
        return 0
    if args.verify:  # each process its share: jax.distributed ends them together
        share = (args.shard_index, args.num_shards) if together else (0, 1)
        checked = []
        for name, number, size in tokenize.verify(codec, plan, args.verify, share):
            checked.append(number)
            print(f"{name}: {number} of {size} codes differ from it alone", flush=True)
        print(f"verified {len(checked)} items, {sum(checked)} codes differ")
    print(f"{args.output}: {summary['num_items']} items, {summary['num_frames']} frames; "
          f"{summary['num_failures']} failures (failures.jsonl)")  # fmt: skip
    return 0 if summary["num_items"] else 1
