"""Groups items of equal shape into batches of two sizes, so that few programs are compiled."""

import collections
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple


class ShapeBatch(NamedTuple):
    """Items of one shape that are computed together.

    Attributes:
      shape: Shape of the items.
      rows: Indices of the items.
      padded_rows: `rows`, and the first one again until the batch is full.
    """

    shape: Any
    rows: list[int]
    padded_rows: list[int]


def batch_by_shape(shapes: Sequence[Hashable], batch_size: int) -> Iterator[ShapeBatch]:
    """Yields batches of items of equal shape, the smallest shape first.

    An item that is the only one of its shape is a batch of its own, all other batches have
    `batch_size` rows. So each shape is compiled at most twice.

    Args:
      shapes: Shape of each item; shapes must be comparable.
      batch_size: Number of `padded_rows`.
    """
    members: dict[Any, list[int]] = collections.defaultdict(list)
    for index, shape in enumerate(shapes):
        members[shape].append(index)
    for shape in sorted(members):
        indices = members[shape]
        size = batch_size if len(indices) > 1 else 1
        for start in range(0, len(indices), size):
            rows = indices[start : start + size]
            padding = [rows[0]] * (size - len(rows))
            yield ShapeBatch(shape, rows, rows + padding)
