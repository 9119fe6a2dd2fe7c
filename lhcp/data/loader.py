"""Batches of one rank: its data-parallel share of sequences, its context-parallel runs of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lhcp.config import ConfigError
from lhcp.data.dataset import TokenDataset
from lhcp.data.sampler import sequence_ids

IGNORE = -100
"""Label of a position without a target."""
Run = tuple[int, int]
"""Tokens [lo, hi) of every sequence; those beyond its end are padding."""
Batch = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Tokens and labels, int64 [sequences, n_local]: the label of a token is the next token of the stream, that of padding,
which is token 0, is `IGNORE`."""


def read_sequences(
    dataset: TokenDataset, ids: Sequence[int] | NDArray[np.int64], seq_len: int, runs: Sequence[Run]
) -> Batch:
    """The tokens in `runs` of sequences `ids`, and their labels: int64 [len(ids), n_local], runs joined.

    Sequence j is tokens [j seq_len, (j+1) seq_len + 1) of the stream. Nothing but the runs is read, each with
    the one token after it, which is its last label.
    """
    n_local = sum(hi - lo for lo, hi in runs)
    tokens = np.zeros((len(ids), n_local), dtype=np.int64)
    labels = np.full_like(tokens, IGNORE)
    for row, sequence in enumerate(ids):
        base = int(sequence) * seq_len
        column = 0
        for lo, hi in runs:
            if (count := min(hi, seq_len) - lo) > 0:
                stream = dataset.read(base + lo, base + lo + count + 1)
                tokens[row, column : column + count] = stream[:-1]
                labels[row, column : column + count] = stream[1:]
            column += hi - lo
    return tokens, labels


class BatchLoader:
    """Gives each optimizer step's micro-batches of one rank. Keeps no position: any step, in any order."""

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        seq_len: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        dp_rank: int,
        dp_size: int,
        runs: Sequence[Run],
    ) -> None:
        """Sizes as in `lhcp.config.RunConfig`.

        Args:
            dataset: the split to train on.
            seq_len: N, tokens of one sequence over all context-parallel ranks.
            global_batch_size: sequences of a step; a multiple of dp_size x micro_batch_size.
            micro_batch_size: sequences of one forward pass.
            seed: of the data order.
            dp_rank: in [0, dp_size); the shares of a step's sequences are equal, contiguous and in order.
            dp_size: data-parallel degree.
            runs: this rank's runs of tokens within a padded sequence, ascending: the whole of one that is not padded is
                [(0, seq_len)].

        Raises:
            ConfigError: the dataset has not one sequence.
        """
        assert global_batch_size % (dp_size * micro_batch_size) == 0, (
            global_batch_size,
            dp_size,
            micro_batch_size,
        )
        _check_rank(dp_rank, dp_size, runs)
        _require_sequences(dataset, seq_len, 1)
        self._dataset = dataset
        self._seq_len = seq_len
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._share = _share(global_batch_size, dp_rank, dp_size)
        self._runs = tuple(runs)

    def micro_batches(self, step: int) -> list[Batch]:
        """(tokens, labels) of optimizer step `step` (from 0), int64 [micro_batch_size, n_local] each."""
        num_sequences = self._dataset.num_sequences(self._seq_len)
        ids = sequence_ids(self._seed, step, self._global_batch_size, num_sequences)[self._share]
        size = self._micro_batch_size
        return [
            read_sequences(self._dataset, ids[first : first + size], self._seq_len, self._runs)
            for first in range(0, len(ids), size)
        ]


def held_out_batches(
    dataset: TokenDataset,
    *,
    seq_len: int,
    num_sequences: int,
    runs: Sequence[Run],
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Iterator[Batch]:
    """This rank's share of the first `num_sequences` sequences, one at a time: int64 [1, n_local] each.

    Every rank gets the same number of batches. Arguments as for `BatchLoader`, checked at the call.

    Raises:
        ConfigError: the dataset has fewer sequences, or they do not divide evenly over data-parallel ranks.
    """
    _check_rank(dp_rank, dp_size, runs)
    if num_sequences % dp_size:
        below = num_sequences // dp_size * dp_size
        raise ConfigError(
            f"{num_sequences} held-out sequences do not divide evenly over {dp_size} data-parallel ranks; "
            f"nearest legal: {f'{below} or ' if below else ''}{below + dp_size}"
        )
    _require_sequences(dataset, seq_len, num_sequences)
    ids = range(num_sequences)[_share(num_sequences, dp_rank, dp_size)]
    return (read_sequences(dataset, [sequence], seq_len, runs) for sequence in ids)


def _share(count: int, dp_rank: int, dp_size: int) -> slice:
    """The part of `count` sequences that belongs to a data-parallel rank: equal, contiguous."""
    each = count // dp_size
    return slice(dp_rank * each, (dp_rank + 1) * each)


def _check_rank(dp_rank: int, dp_size: int, runs: Sequence[Run]) -> None:
    assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
    borders = [border for run in runs for border in run]
    assert borders == sorted(borders), f"runs {runs} do not ascend"
    assert runs, "a rank has no runs"
    assert all(lo < hi for lo, hi in runs), f"runs {runs} have an empty one"
    assert borders[0] >= 0, f"runs {runs} begin before the sequence"


def _require_sequences(dataset: TokenDataset, seq_len: int, count: int) -> None:
    if dataset.num_sequences(seq_len) < count:
        raise ConfigError(
            f"the {dataset.split} split in {dataset.path} has {dataset.num_tokens} tokens, but "
            f"{count} sequence(s) of seq_len {seq_len} need {count * seq_len + 1}; prepare more text, or use "
            f"fewer or shorter sequences"
        )
