"""Finds input files and reads documents from them, one at a time."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from lhcp.config import ConfigError

# fmt: off
TEXT_SUFFIXES = (
    ".txt", ".md", ".rst", ".tex", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".java",
    ".js", ".ts", ".go", ".rs", ".rb", ".sh",
)
# fmt: on
"""Files that are one document each."""

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz")
"""Files that are one document a line; C4 and others name theirs .json.gz."""


def find_files(inputs: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    """Every file to read: the given files, and those under the given folders, in a fixed order.

    Folders are walked in sorted order; hidden files and folders are left out, links to folders are not
    followed, and only names that end in one of `suffixes` or of `JSONL_SUFFIXES` (in any case) are taken. A
    file that is named itself may also have no suffix at all.

    Raises:
        ConfigError: an input does not exist or is of a kind that is not read, or no file was found.
    """
    wrong = [suffix for suffix in suffixes if not suffix.startswith(".")]
    if wrong:
        raise ConfigError(f"suffixes {wrong} do not begin with a dot; a valid one is '.txt'")
    wanted = (*JSONL_SUFFIXES, *(suffix.lower() for suffix in suffixes))
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += [found for found in _walk(path) if found.name.lower().endswith(wanted)]
        elif not path.exists():
            raise ConfigError(f"input {path} does not exist")
        elif path.suffix and not path.name.lower().endswith(wanted):
            raise ConfigError(
                f"input {path} is of a kind that is not read; known: {' '.join(wanted)} (add one of text "
                f"files with --suffix)"
            )
        else:
            files.append(path)
    if not files:
        places = ", ".join(map(str, inputs)) or "no input at all"
        raise ConfigError(f"no input file found in {places}; looked for names ending in {' '.join(wanted)}")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Files under `folder`, sorted, nothing hidden."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        elif entry.is_file():
            yield Path(entry.path)


def read_documents(files: Iterable[Path], text_key: str) -> Iterator[bytes]:
    """The documents of `files` in order, as bytes: a whole text file as it is, or `text_key` of a JSONL line.

    Raises:
        ConfigError: naming file:line, when a JSONL line is not an object whose `text_key` is a string.
    """
    for path in files:
        name = path.name.lower()
        if not name.endswith(JSONL_SUFFIXES):
            yield path.read_bytes()
            continue
        with gzip.open(path) if name.endswith(".gz") else path.open("rb") as lines:
            for number, line in enumerate(_lines(lines, path), start=1):
                if line.strip():
                    yield _text_of(line, text_key, f"{path}:{number}")


def _lines(file: IO[bytes] | gzip.GzipFile, path: Path) -> Iterator[bytes]:
    try:
        yield from file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(f"{path} is not a whole gzip file: {error}") from error


def _text_of(line: bytes, text_key: str, place: str) -> bytes:
    """The document on one JSONL line; `place` is its file:line."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place} is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{place} is a JSON {type(record).__name__}, not an object with the key {text_key!r}")
    if text_key not in record:
        raise ConfigError(f"{place} has no key {text_key!r}; it has {list(record)} (choose one with --text-key)")
    text = record[text_key]
    if not isinstance(text, str):
        raise ConfigError(f"{place}: the value of {text_key!r} is a {type(text).__name__}, not a string")
    # JSON may hold lone surrogates (escaped), which strict UTF-8 refuses.
    return text.encode("utf-8", "surrogatepass")
