"""`BatchLoader`: every layout of ranks sees the same global batch, each rank reading only its own part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lhcp.config import ConfigError
from lhcp.data import Batch, BatchLoader, Run, TokenDataset, held_out_batches, read_sequences, sequence_ids
from lhcp.data.index import DatasetIndex, SourceCounts, SplitIndex, SplitName, write_index
from lhcp.data.shards import ShardWriter

SEQ_LEN = 24
STREAM = np.arange(SEQ_LEN * 11 + 5)
NUM_SEQUENCES = 11
LAYOUTS = [(1, "zigzag"), (2, "zigzag"), (4, "zigzag"), (2, "contiguous"), (4, "contiguous")]


class RecordingDataset(TokenDataset):
    """Notes every range that is read."""

    def __init__(self, path: Path, split: SplitName) -> None:
        super().__init__(path, split)
        self.reads: list[Run] = []

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        self.reads.append((start, stop))
        return super().read(start, stop)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Both splits are STREAM (token t is t), in shards of 13 tokens."""
    splits: dict[SplitName, SplitIndex] = {}
    names: tuple[SplitName, ...] = ("train", "held_out")
    for split in names:
        with ShardWriter(tmp_path, split, 13) as writer:
            writer.append(STREAM.astype(np.uint16), text_bytes=len(STREAM))
            splits[split] = writer.finish()
    sources = SourceCounts(files=1, documents=2, duplicates=0, empty=0)
    write_index(tmp_path, DatasetIndex(tokenizer="test", vocab_size=300, splits=splits, sources=sources))
    return tmp_path


def runs_of(rank: int, cp: int, sharding: str) -> list[Run]:
    if sharding == "zigzag" and cp > 1:
        size = SEQ_LEN // (2 * cp)
        return [(chunk * size, (chunk + 1) * size) for chunk in (rank, 2 * cp - 1 - rank)]
    size = SEQ_LEN // cp
    return [(rank * size, (rank + 1) * size)]


def loader(dataset: TokenDataset, runs: Sequence[Run], rank: int = 0, dp: int = 1, micro: int = 1) -> BatchLoader:
    return BatchLoader(
        dataset,
        seq_len=SEQ_LEN,
        global_batch_size=4,
        micro_batch_size=micro,
        seed=3,
        dp_rank=rank,
        dp_size=dp,
        runs=runs,
    )


def put(batch: Batch, runs: Sequence[Run], whole: Batch) -> None:
    """Write a rank's batch to its places in whole sequences."""
    column = 0
    for lo, hi in runs:
        for local, target in zip(batch, whole, strict=True):
            target[:, lo:hi] = local[:, column : column + hi - lo]
        column += hi - lo
    assert column == batch[0].shape[1] == batch[1].shape[1]


def empty_batch(sequences: int) -> Batch:
    return np.full((sequences, SEQ_LEN), -1), np.full((sequences, SEQ_LEN), -1)


def expected(ids: Sequence[int]) -> Batch:
    tokens = np.stack([STREAM[j * SEQ_LEN : (j + 1) * SEQ_LEN] for j in ids])
    return tokens, tokens + 1


@pytest.mark.parametrize(("cp", "sharding"), LAYOUTS)
@pytest.mark.parametrize(("dp", "micro"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)])
def test_ranks_together_hold_the_global_batch(folder: Path, cp: int, sharding: str, dp: int, micro: int) -> None:
    for step in range(4):  # crosses the end of the first epoch
        ids = sequence_ids(3, step, 4, NUM_SEQUENCES).tolist()
        shares = []
        for dp_rank in range(dp):
            share = [empty_batch(micro) for _ in range(4 // dp // micro)]
            for cp_rank in range(cp):
                runs = runs_of(cp_rank, cp, sharding)
                dataset = TokenDataset(folder, "train")
                batches = loader(dataset, runs, dp_rank, dp, micro).micro_batches(step)
                assert len(batches) == len(share)
                for batch, whole in zip(batches, share, strict=True):
                    assert all(part.dtype == np.int64 for part in batch)
                    assert all(part.shape == (micro, SEQ_LEN // cp) for part in batch)
                    put(batch, runs, whole)
            shares += share
        for parts, wanted in zip(zip(*shares, strict=True), expected(ids), strict=True):
            np.testing.assert_array_equal(np.concatenate(parts), wanted)


@pytest.mark.parametrize(("cp", "sharding"), LAYOUTS)
def test_a_rank_reads_only_its_runs(folder: Path, cp: int, sharding: str) -> None:
    ids = sequence_ids(3, 1, 4, NUM_SEQUENCES).tolist()
    for cp_rank in range(cp):
        for dp_rank in range(2):
            runs = runs_of(cp_rank, cp, sharding)
            dataset = RecordingDataset(folder, "train")
            loader(dataset, runs, dp_rank, 2).micro_batches(1)
            mine = ids[2 * dp_rank : 2 * dp_rank + 2]
            assert dataset.reads == [(j * SEQ_LEN + lo, j * SEQ_LEN + hi + 1) for j in mine for lo, hi in runs]


def test_labels_cross_chunks_and_sequences(folder: Path) -> None:
    dataset = TokenDataset(folder, "train")
    tokens, labels = read_sequences(dataset, [0, NUM_SEQUENCES - 1], SEQ_LEN, [(6, 12), (18, 24)])
    assert tokens[0].tolist() == [*range(6, 12), *range(18, 24)]
    assert labels[0].tolist() == [*range(7, 13), *range(19, 25)]
    assert labels[1, -1] == NUM_SEQUENCES * SEQ_LEN


def test_any_step_in_any_order(folder: Path) -> None:
    dataset = TokenDataset(folder, "train")
    one, other = loader(dataset, [(0, SEQ_LEN)]), loader(dataset, [(0, SEQ_LEN)])
    for step in range(5):
        one.micro_batches(step)
    np.testing.assert_array_equal(one.micro_batches(2)[0][0], other.micro_batches(2)[0][0])


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize(("cp", "sharding"), LAYOUTS)
def test_held_out(folder: Path, dp: int, cp: int, sharding: str) -> None:
    whole = [empty_batch(1) for _ in range(6)]
    for dp_rank in range(dp):
        for cp_rank in range(cp):
            runs = runs_of(cp_rank, cp, sharding)
            dataset = RecordingDataset(folder, "held_out")
            batches = held_out_batches(
                dataset, seq_len=SEQ_LEN, num_sequences=6, runs=runs, dp_rank=dp_rank, dp_size=dp
            )
            assert dataset.reads == []
            for number, batch in enumerate(batches):
                put(batch, runs, whole[dp_rank * 6 // dp + number])
            assert len(dataset.reads) == 6 // dp * len(runs)
    for parts, wanted in zip(zip(*whole, strict=True), expected(range(6)), strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), wanted)


def test_no_held_out_sequences(folder: Path) -> None:
    dataset = TokenDataset(folder, "held_out")
    assert list(held_out_batches(dataset, seq_len=SEQ_LEN, num_sequences=0, runs=[(0, SEQ_LEN)])) == []


def test_too_few_tokens(folder: Path) -> None:
    train, held_out = TokenDataset(folder, "train"), TokenDataset(folder, "held_out")
    message = r"the train split in .* has 269 tokens, but 1 sequence\(s\) of seq_len 269 need 270; prepare more text"
    with pytest.raises(ConfigError, match=message):
        BatchLoader(
            train,
            seq_len=269,
            global_batch_size=1,
            micro_batch_size=1,
            seed=0,
            dp_rank=0,
            dp_size=1,
            runs=[(0, 269)],
        )
    message = r"the held_out split in .* has 269 tokens, but 12 sequence\(s\) of seq_len 24 need 289"
    with pytest.raises(ConfigError, match=message):
        held_out_batches(held_out, seq_len=SEQ_LEN, num_sequences=12, runs=[(0, SEQ_LEN)])


@pytest.mark.parametrize(("count", "legal"), [(7, "6 or 9"), (2, "3")])
def test_held_out_sequences_divide_over_ranks(folder: Path, count: int, legal: str) -> None:
    dataset = TokenDataset(folder, "held_out")
    message = f"{count} held-out sequences do not divide evenly over 3 data-parallel ranks; nearest legal: {legal}$"
    with pytest.raises(ConfigError, match=message):
        held_out_batches(dataset, seq_len=SEQ_LEN, num_sequences=count, runs=[(0, SEQ_LEN)], dp_size=3)


@pytest.mark.parametrize("runs", [[], [(0, 0)], [(-1, 4)], [(12, 18), (0, 6)], [(0, 6), (5, 11)]])
def test_impossible_runs(folder: Path, runs: list[Run]) -> None:
    with pytest.raises(AssertionError, match="runs"):
        loader(TokenDataset(folder, "train"), runs)
