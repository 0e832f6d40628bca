"""Arguments that several commands share."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any


def add_codec(parser: argparse.ArgumentParser) -> None:
    """--checkpoint and --num-quantizers."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="C",
        help="checkpoint, training workdir, official directory or Hub id",
    )
    add_num_quantizers(parser)


def add_num_quantizers(parser: argparse.ArgumentParser) -> None:
    """--num-quantizers."""
    parser.add_argument(
        "--num-quantizers",
        type=int,
        metavar="N",
        help="use the first N quantizers; fewer means a lower bitrate (default: all)",
    )


def chunk_frames(config: Any, seconds: float) -> int:
    """Code frames that are computed at once of a recording so long."""
    from moss_tok.codec import inference

    return max(1, round(min(seconds, inference.CHUNK_SECONDS) * config.frame_rate))


def progress(parts: Iterable[Any], total_seconds: float, part_seconds: float) -> Iterator[Any]:
    """Passes `parts` on, each worth `part_seconds` of audio, behind a bar, or in logs ten lines."""
    import tqdm

    terminal, done = sys.stderr.isatty(), 0.0
    total = round(total_seconds) if total_seconds < 1e9 else None  # streamed files do not know
    with tqdm.tqdm(total=total, unit="s", disable=not terminal, leave=False) as bar:
        for part in parts:
            yield part
            before, done = done, done + part_seconds
            bar.update(round(done) - round(before))
            if (
                not terminal
                and total_seconds > 600
                and done * 10 // total_seconds > (before * 10 // total_seconds)
            ):
                print(f"{done:.0f} of {total_seconds:.0f} s", file=sys.stderr, flush=True)
