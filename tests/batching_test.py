"""Batches of items of equal shape."""

import numpy as np
import pytest

from moss_tok.batching import batch_by_shape


@pytest.mark.parametrize("num_items", [0, 1, 2, 5, 40])
def test_every_item_is_in_one_batch_of_its_shape(num_items):
    shapes = np.random.default_rng(num_items).integers(1, 4, (num_items, 2)).tolist()
    shapes = [tuple(shape) for shape in shapes]
    batches = list(batch_by_shape(shapes, 3))
    rows = []
    sizes = set()
    for batch in batches:
        assert {shapes[row] for row in batch.padded_rows} == {batch.shape}
        assert batch.padded_rows[: len(batch.rows)] == batch.rows
        sizes.add((batch.shape, len(batch.padded_rows)))
        rows += batch.rows
    assert sorted(rows) == list(range(num_items))
    assert {size for _, size in sizes} <= {1, 3}
    assert [batch.shape for batch in batches] == sorted(batch.shape for batch in batches)


def test_only_a_shape_of_one_item_has_a_batch_of_one():
    batches = list(batch_by_shape([8, 16, 8, 8, 8], 3))
    assert [tuple(batch) for batch in batches] == [
        (8, [0, 2, 3], [0, 2, 3]),
        (8, [4], [4, 4, 4]),
        (16, [1], [1]),
    ]
