"""Makes a dataset: reads documents, splits them into train and held-out, and writes token shards."""

from __future__ import annotations

import hashlib
import math
import shutil
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lhcp.config import ConfigError
from lhcp.data.documents import TEXT_SUFFIXES, find_files, read_documents
from lhcp.data.index import INDEX_FILE, DatasetIndex, SourceCounts, write_index
from lhcp.data.shards import SHARD_NAME, ShardWriter
from lhcp.data.tokenizer import ByteTokenizer
from lhcp.files import checksum_file


def prepare(
    inputs: Sequence[Path],
    out: Path,
    *,
    held_out: float = 0.05,
    shard_tokens: int = 1 << 26,
    text_key: str = "text",
    suffixes: Sequence[str] = TEXT_SUFFIXES,
    overwrite: bool = False,
) -> DatasetIndex:
    """Write the dataset `out` (`index.json`, its checksum, and shards of little-endian uint16 tokens) from text.

    Each document is its byte tokens and an end-of-document token. A hash of its content decides its split, so
    the split depends on no order and a document stays where it is as others come; documents with the same
    content are kept once. One document is in memory at a time, and 16 bytes for each document seen. `out`
    appears when it is complete: an interrupted run leaves no dataset (at worst a hidden `.NAME.*.tmp` folder
    beside it).

    Args:
        inputs: text files (one document each), `.jsonl`, `.jsonl.gz` or `.json.gz` files (one document a line), or
            folders that are searched for them (see `documents.find_files`).
        out: the folder to write; must be missing or empty, unless `overwrite`.
        held_out: expected share of documents in the held-out split, in [0, 1); 0: no held-out split.
        shard_tokens: tokens of a shard file.
        text_key: the key of JSONL objects that holds the text.
        suffixes: endings of text files to take from folders.
        overwrite: replace `out` if it is a dataset.

    Raises:
        ConfigError: no input, an input that cannot be read as what it is, an empty split, or `out` is in use.
    """
    if not 0 <= held_out < 1:
        raise ConfigError(f"held_out {held_out} is not a share of the documents; valid: 0 (none) to below 1")
    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens {shard_tokens} must be at least 1")
    files = find_files(inputs, suffixes)
    with _published(out.resolve(), overwrite) as folder:
        index = _write_shards(files, folder, held_out=held_out, shard_tokens=shard_tokens, text_key=text_key)
        write_index(folder, index)
    return index


def _write_shards(
    files: Sequence[Path], folder: Path, *, held_out: float, shard_tokens: int, text_key: str
) -> DatasetIndex:
    tokenizer = ByteTokenizer()
    end = np.array([tokenizer.eos_id], dtype=np.uint16)
    seen: set[bytes] = set()
    documents = empty = 0
    with (
        ShardWriter(folder, "train", shard_tokens) as train_writer,
        ShardWriter(folder, "held_out", shard_tokens) as held_out_writer,
    ):
        for text in read_documents(files, text_key):
            documents += 1
            digest = hashlib.blake2b(text, digest_size=16).digest()
            if not text:
                empty += 1
            elif digest not in seen:
                seen.add(digest)
                writer = held_out_writer if _position(digest) < held_out else train_writer
                writer.append(np.concatenate([tokenizer.encode(text), end]), text_bytes=len(text))
        _check_split(seen, held_out)
        return DatasetIndex(
            tokenizer=tokenizer.name,
            vocab_size=tokenizer.vocab_size,
            splits={"train": train_writer.finish(), "held_out": held_out_writer.finish()},
            sources=SourceCounts(
                files=len(files), documents=documents, duplicates=documents - empty - len(seen), empty=empty
            ),
        )


def _position(digest: bytes) -> float:
    """Where a document lies in [0, 1); below `held_out` it is held out."""
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _check_split(digests: Collection[bytes], held_out: float) -> None:
    """Raise ConfigError, saying what to do, when a split that should have documents has none."""
    if not digests:
        raise ConfigError("the input files hold no text: every document is empty")
    lowest, highest = min(map(_position, digests)), max(map(_position, digests))
    if highest < held_out:
        empty, remedy = "train", f"set --held-out to {math.floor(highest * 1e6) / 1e6} or lower"
    elif held_out and lowest >= held_out:
        empty = "held_out"
        remedy = f"set --held-out to {math.ceil(lowest * 1e6) / 1e6} or higher, or to 0 for no such split"
    else:
        return
    if len(digests) == 1:
        raise ConfigError(
            f"the {empty} split is empty: there is one distinct document, and documents are not divided; "
            f"give more (files, or lines of JSONL), or set --held-out to 0 for no held-out split"
        )
    raise ConfigError(
        f"the {empty} split is empty: the hashes of the {len(digests)} distinct documents put none there "
        f"at --held-out {held_out}; add documents, or {remedy}"
    )


@contextmanager
def _published(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `out`, renamed to `out` if the body succeeds, removed if it fails."""
    _check_free(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex[:8]
    folder = out.with_name(f".{out.name}.{unique}.tmp")
    replaced = out.with_name(f".{out.name}.{unique}.old.tmp")
    folder.mkdir()
    try:
        yield folder
        if overwrite and out.exists():
            out.rename(replaced)
        # Onto a missing or empty folder; an error if another process has filled it meanwhile.
        folder.rename(out)
    finally:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"out {out} is a file; name a folder")
    names = {entry.name for entry in out.iterdir()}
    if names and not overwrite:
        raise ConfigError(f"out {out} exists and is not empty; name another folder, or replace it with --overwrite")
    own = {INDEX_FILE, checksum_file(out / INDEX_FILE).name}
    others = sorted(name for name in names - own if not SHARD_NAME.fullmatch(name))
    if names and (others or INDEX_FILE not in names):
        raise ConfigError(
            f"out {out} is not replaced, since it is not (only) a dataset: it has "
            f"{', '.join(others[:5]) or f'no {INDEX_FILE}'}"
        )
