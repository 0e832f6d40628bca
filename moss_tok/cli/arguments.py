"""Arguments that several commands share."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
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
    known = total_seconds < 1e9  # streamed files do not say
    total = round(total_seconds / part_seconds) if known else 0
    with counter(total, "", part_seconds, "s", least=20) as count:
        for part in parts:
            yield part
            count()


@contextlib.contextmanager
def counter(
    total: int, title: str, scale: float = 1.0, unit: str = "files", least: int = 10
) -> Iterator[Callable[[], None]]:
    """A function to call after each of `total` parts: a bar on a terminal, ten lines in a log.

    Args:
      total: Parts; 0: unknown.
      title: Before the numbers.
      scale: What a part counts, in `unit`.
      unit: Of the numbers.
      least: With fewer parts a log gets no line.
    """
    import tqdm

    terminal, done = sys.stderr.isatty(), 0
    bar = tqdm.tqdm(
        total=total * scale or None,
        desc=title or None,
        unit=unit,
        disable=not terminal,
        leave=False,
    )

    def count() -> None:
        nonlocal done
        done += 1
        bar.update(scale)
        if not terminal and total >= least and done * 10 // total > (done - 1) * 10 // total:
            text = f"{done * scale:.0f} of {total * scale:.0f} {unit}"
            print(f"{title}: {text}" if title else text, file=sys.stderr, flush=True)

    with bar:
        yield count
