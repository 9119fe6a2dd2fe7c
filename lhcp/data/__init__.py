"""Tokens: written once by `prepare`, memory-mapped by `TokenDataset`, given to ranks by `BatchLoader`.

Imports no torch, so that the command line is fast and works on login nodes. The steps in order:

    documents -> tokenizer -> shards + index (`prepare`) -> `TokenDataset` -> `sequence_ids` -> `BatchLoader`

A split is one stream of tokens, each document followed by the end-of-document token. Sequence j of length N
reads tokens [j N, (j+1) N + 1) of it; documents in one sequence are not masked from each other.
"""

from lhcp.data.dataset import TokenDataset, verify_shards
from lhcp.data.documents import TEXT_SUFFIXES
from lhcp.data.entropy import bigram_entropy, unigram_entropy
from lhcp.data.index import DatasetIndex, SplitName, read_index
from lhcp.data.loader import IGNORE, Batch, BatchLoader, Run, held_out_batches, read_sequences
from lhcp.data.prepare import prepare
from lhcp.data.sampler import sequence_ids
from lhcp.data.tokenizer import ByteTokenizer

__all__ = [
    "IGNORE",
    "TEXT_SUFFIXES",
    "Batch",
    "BatchLoader",
    "ByteTokenizer",
    "DatasetIndex",
    "Run",
    "SplitName",
    "TokenDataset",
    "bigram_entropy",
    "held_out_batches",
    "prepare",
    "read_index",
    "read_sequences",
    "sequence_ids",
    "unigram_entropy",
    "verify_shards",
]
