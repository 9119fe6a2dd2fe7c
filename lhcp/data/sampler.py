"""Which sequences an optimizer step uses: a pure function, the same at every number of processes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def sequence_ids(seed: int, step: int, global_batch_size: int, num_sequences: int) -> NDArray[np.int64]:
    """The sequences of optimizer step `step` (from 0), int64 [global_batch_size], each in [0, num_sequences).

    Sample c = step x global_batch_size + i of a run is number c % num_sequences of epoch c // num_sequences;
    an epoch is a permutation of all sequences that depends on (seed, epoch) only. A step may span epochs.
    """
    assert min(seed, step) >= 0, (seed, step)
    assert min(global_batch_size, num_sequences) >= 1, (global_batch_size, num_sequences)
    ids = np.empty(global_batch_size, dtype=np.int64)
    done = 0
    while done < global_batch_size:
        epoch, offset = divmod(step * global_batch_size + done, num_sequences)
        piece = _permutation(seed, epoch, num_sequences)[offset : offset + global_batch_size - done]
        ids[done : done + len(piece)] = piece
        done += len(piece)
    return ids


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """A permutation of range(size), int64, read-only."""
    # The order of random keys, not Generator.permutation: numpy keeps the streams of SeedSequence and PCG64
    # across its versions (NEP 19) but not Generator's methods, and a resumed run must keep its order.
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(size)
    order = np.argsort(keys, kind="stable").astype(np.int64, copy=False)
    order.setflags(write=False)
    return order
