"""Batches of rows, against plain loops."""

import numpy as np
import pytest

from convscope.arrays import batched, padded

pytestmark = pytest.mark.without_keras


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("rows", [1, 4, 5, 7])
def test_batches_hold_every_row_once_and_have_one_shape(rows, size):
    one, other = np.arange(rows * 6).reshape(rows, 3, 2), np.arange(rows) * 10.0
    found = list(batched(size, one, other))
    assert [batch.start for batch in found] == list(range(0, rows, size))
    assert {batch.arrays[0].shape for batch in found} == {(size, 3, 2)}
    assert {batch.arrays[1].shape for batch in found} == {(size,)}
    for array, number in ((one, 0), (other, 1)):
        kept = [row for batch in found for row in batch.arrays[number][: batch.count]]
        assert len(kept) == rows
        for row, expected in zip(kept, array, strict=True):
            np.testing.assert_array_equal(row, expected)


def test_nothing_gives_no_batch():
    assert list(batched(3, np.zeros((0, 2)))) == []


def test_padding_repeats_rows_in_order():
    np.testing.assert_array_equal(padded(np.array([[1], [2]]), 5), [[1], [2], [1], [2], [1]])
    array = np.arange(3)
    same = padded(array, 3)
    np.testing.assert_array_equal(same, array)
    assert not np.shares_memory(same, array)  # where it lies in memory could change how a pass rounds
