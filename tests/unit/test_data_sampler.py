"""`sequence_ids`: pure, and a permutation an epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lhcp.data import sequence_ids
from lhcp.data.sampler import _permutation


def stream(seed: int, batch: int, sequences: int, count: int) -> list[int]:
    """The first `count` samples of a run."""
    steps = -(-count // batch)
    ids = [i for step in range(steps) for i in sequence_ids(seed, step, batch, sequences).tolist()]
    return ids[:count]


@given(seed=st.integers(0, 2**40), batch=st.integers(1, 17), other=st.integers(1, 17), sequences=st.integers(1, 13))
def test_each_epoch_is_a_permutation_at_any_batch_size(seed: int, batch: int, other: int, sequences: int) -> None:
    ids = stream(seed, batch, sequences, 4 * sequences)
    for epoch in range(4):
        assert sorted(ids[epoch * sequences : (epoch + 1) * sequences]) == list(range(sequences))
    assert stream(seed, other, sequences, 4 * sequences) == ids


def test_pure_function_of_its_arguments() -> None:
    expected = {step: sequence_ids(5, step, 8, 21) for step in range(20)}
    for step in np.random.default_rng(0).permutation(20):
        _permutation.cache_clear()
        ids = sequence_ids(5, int(step), 8, 21)
        assert ids.dtype == np.int64
        assert ids.shape == (8,)
        np.testing.assert_array_equal(ids, expected[int(step)])


def test_result_does_not_alias_the_cache() -> None:
    first = sequence_ids(0, 0, 4, 16)
    kept = first.copy()
    first[:] = -1
    np.testing.assert_array_equal(sequence_ids(0, 0, 4, 16), kept)
    with pytest.raises(ValueError, match="read-only"):
        _permutation(0, 0, 16)[0] = 1


def test_order_differs_by_epoch_and_seed() -> None:
    orders = [tuple(sequence_ids(seed, epoch, 100, 100).tolist()) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16
    assert tuple(range(100)) not in orders


def test_order_is_uniform() -> None:
    """Where sequence 0 lies, over many epochs: within 5 standard deviations of the mean."""
    places = [int(np.flatnonzero(sequence_ids(1, epoch, 50, 50) == 0)[0]) for epoch in range(2000)]
    deviation = np.sqrt((50**2 - 1) / 12 / 2000)
    assert abs(np.mean(places) - 24.5) < 5 * deviation


def test_order_never_changes() -> None:
    """A run resumed with a later version of this code, or of numpy, must go on in the same order."""
    assert sequence_ids(0, 0, 10, 10).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    assert sequence_ids(1234, 7, 6, 12).tolist() == [11, 0, 4, 1, 7, 6]


def test_far_steps() -> None:
    ids = sequence_ids(0, 10**12, 7, 5)
    assert sorted(set(ids.tolist())) == list(range(5))
