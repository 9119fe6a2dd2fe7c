"""`lhcp.data.prepare`: what is read, how it is split, what is written, and what a user is told."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lhcp.config import ConfigError
from lhcp.data import ByteTokenizer, DatasetIndex, TokenDataset, prepare
from lhcp.data.index import read_index
from lhcp.data.shards import ShardWriter

DOCUMENTS = [f"document number {i}: " + "x" * (i % 7) for i in range(200)]


def write_jsonl(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def documents_of(folder: Path, split: str) -> list[str]:
    """The split's documents, from the raw shard files."""
    index = json.loads((folder / "index.json").read_text())
    raw = b"".join((folder / shard["file"]).read_bytes() for shard in index["splits"][split]["shards"])
    tokens = np.frombuffer(raw, dtype="<u2")
    ends = np.flatnonzero(tokens == 256)
    assert len(tokens) == 0 or ends[-1] == len(tokens) - 1
    return [
        tokens[start:end].astype(np.uint8).tobytes().decode()
        for start, end in zip([0, *(ends[:-1] + 1)], ends, strict=False)
    ]


class TestTokenizer:
    def test_bytes_and_end_of_document(self) -> None:
        tokenizer = ByteTokenizer()
        ids = tokenizer.encode("aé")
        assert ids.dtype == np.uint16
        assert ids.tolist() == [0x61, 0xC3, 0xA9]
        assert tokenizer.encode(b"\xff\x00").tolist() == [255, 0]
        assert tokenizer.encode("").shape == (0,)
        assert tokenizer.decode([0x61, 256, 0xC3, 0xA9, 256]) == "aé"
        assert tokenizer.decode([0xFF]) == "\ufffd"
        assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eos_id) == ("byte", 257, 256)

    @given(st.text())
    def test_round_trip(self, text: str) -> None:
        assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text

    @pytest.mark.parametrize("bad", [257, -1])
    def test_outside_the_vocabulary(self, bad: int) -> None:
        with pytest.raises(ValueError, match=rf"token id {bad} is outside the byte vocabulary, 0 to 256"):
            ByteTokenizer().decode([1, bad])


class TestReading:
    def test_a_folder_of_c4(self, tmp_path: Path) -> None:
        for number in range(2):
            with gzip.open(tmp_path / f"c4-train.0000{number}-of-01024.json.gz", "wt") as file:
                for line in range(3):
                    record = {"text": f"{number} {line}", "timestamp": "2019-04-25T12:57:54Z", "url": "https://x"}
                    print(json.dumps(record), file=file)
        index = prepare([tmp_path], tmp_path / "out", held_out=0)
        assert (index.sources.files, index.sources.documents) == (2, 6)
        assert index.splits["train"].tokens == 6 * 4  # three bytes and the end

    def test_files_folders_and_jsonl(self, tmp_path: Path) -> None:
        folder = tmp_path / "in"
        (folder / "b").mkdir(parents=True)
        (folder / "b" / "one.py").write_text("print(1)")
        (folder / "a.TXT").write_text("from a text file")
        (folder / "empty.txt").touch()
        (folder / "image.png").write_bytes(b"not text")
        (folder / ".git").mkdir()
        (folder / ".git" / "hidden.txt").write_text("hidden")
        (folder / ".hidden.txt").write_text("hidden")
        write_jsonl(folder / "z.jsonl", ["from jsonl é \ud800", "from a text file"])
        with gzip.open(folder / "y.jsonl.gz", "wt") as file:
            file.write('{"text": "from gzip", "other": 1}\n\n')
        bare = tmp_path / "corpus"
        bare.write_bytes(b"\xff\xfe")

        index = prepare([folder, bare], tmp_path / "out", held_out=0)

        tokens = TokenDataset(tmp_path / "out", "train").read(0, index.splits["train"].tokens)
        texts = b"from a text file", b"print(1)", b"from gzip", b"from jsonl \xc3\xa9 \xed\xa0\x80", b"\xff\xfe"
        assert tokens.tolist() == [token for text in texts for token in (*text, 256)]
        assert index.sources.model_dump() == {"files": 6, "documents": 7, "duplicates": 1, "empty": 1}
        assert index.splits["train"].documents == 5
        assert index.splits["train"].text_bytes == sum(map(len, texts))

    def test_key_and_suffixes(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "a.jsonl", ["a", "b"], key="body")
        (tmp_path / "c.log").write_text("c")
        (tmp_path / "d.txt").write_text("d")
        prepare([tmp_path], tmp_path / "out", held_out=0, text_key="body", suffixes=[".log"])
        assert documents_of(tmp_path / "out", "train") == ["a", "b", "c"]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"text": "cut', r"a\.jsonl:3 is not valid JSON: .*"),
            ("\xff", r"a\.jsonl:3 is not valid JSON: .*"),
            ('["x"]', r"a\.jsonl:3 is a JSON list, not an object with the key 'text'"),
            (
                '{"body": "x", "id": 1}',
                r"a\.jsonl:3 has no key 'text'; it has \['body', 'id'\] \(choose one with --text-key\)",
            ),
            ('{"text": 5}', r"a\.jsonl:3: the value of 'text' is a int, not a string"),
        ],
    )
    @pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json.gz"])
    def test_bad_line(self, tmp_path: Path, suffix: str, line: str, message: str) -> None:
        path = tmp_path / f"a{suffix}"
        content = ('{"text": "fine"}\n\n' + line + "\n").encode("latin-1")
        path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
        with pytest.raises(ConfigError, match=message.replace(r"\.jsonl", suffix.replace(".", r"\."))):
            prepare([path], tmp_path / "out", held_out=0)
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]

    @pytest.mark.parametrize("damage", ["cut", "no gzip", "bits"])
    def test_damaged_gzip(self, tmp_path: Path, damage: str) -> None:
        whole = bytearray(gzip.compress(b'{"text": "abcdefghijklmnop"}\n' * 100))
        if damage == "bits":
            whole[10] = 0xFF  # no such type of deflate block
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes({"cut": bytes(whole[:-9]), "no gzip": b"plain", "bits": bytes(whole)}[damage])
        with pytest.raises(ConfigError, match=r"a\.jsonl\.gz is not a whole gzip file: .+"):
            prepare([path], tmp_path / "out", held_out=0)

    def test_nothing_to_read(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.png").touch()
        message = r"no input file found in .*/in; looked for names ending in \.jsonl \.jsonl\.gz \.json\.gz \.txt \.md"
        with pytest.raises(ConfigError, match=message):
            prepare([tmp_path / "in"], tmp_path / "out")
        with pytest.raises(ConfigError, match="no input file found in no input at all; looked for"):
            prepare([], tmp_path / "out")
        with pytest.raises(ConfigError, match=r"input .*/absent does not exist"):
            prepare([tmp_path / "absent"], tmp_path / "out")
        with pytest.raises(
            ConfigError, match=r"a\.png is of a kind that is not read; known: \.jsonl \.jsonl\.gz \.json\.gz"
        ):
            prepare([tmp_path / "in" / "a.png"], tmp_path / "out")
        with pytest.raises(ConfigError, match=r"suffixes \['txt'\] do not begin with a dot; a valid one is"):
            prepare([tmp_path / "in"], tmp_path / "out", suffixes=["txt"])
        (tmp_path / "in" / "a.txt").touch()
        with pytest.raises(ConfigError, match="the input files hold no text: every document is empty"):
            prepare([tmp_path / "in"], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("share", [-0.1, 1, 2, float("nan")])
    def test_bad_share(self, tmp_path: Path, share: float) -> None:
        with pytest.raises(ConfigError, match=r"held_out .* is not a share of the documents; valid: 0"):
            prepare([tmp_path], tmp_path / "out", held_out=share)

    def test_bad_shard_tokens(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="shard_tokens 0 must be at least 1"):
            prepare([tmp_path], tmp_path / "out", shard_tokens=0)


class TestSplit:
    def test_whole_documents_whatever_their_order(self, tmp_path: Path) -> None:
        forwards = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
        backwards = write_jsonl(tmp_path / "b.jsonl", [*DOCUMENTS[::-1], *DOCUMENTS[:50]])
        first = prepare([forwards], tmp_path / "out1", held_out=0.2)
        second = prepare([backwards], tmp_path / "out2", held_out=0.2)

        train, held_out = (documents_of(tmp_path / "out1", split) for split in ("train", "held_out"))
        assert sorted(train + held_out) == sorted(DOCUMENTS)
        assert 20 <= len(held_out) <= 60
        assert documents_of(tmp_path / "out2", "train") == train[::-1]
        assert documents_of(tmp_path / "out2", "held_out") == held_out[::-1]
        assert first.splits["held_out"].documents == len(held_out)
        assert (first.sources.duplicates, second.sources.duplicates) == (0, 50)

    def test_a_higher_share_only_adds(self, tmp_path: Path) -> None:
        source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
        held_out: set[str] = set()
        for share in (0.1, 0.3, 0.6):
            out = tmp_path / str(share)
            prepare([source], out, held_out=share)
            assert held_out < set(documents_of(out, "held_out"))
            held_out = set(documents_of(out, "held_out"))

    def test_none_held_out(self, tmp_path: Path) -> None:
        index = prepare([write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)], tmp_path / "out", held_out=0)
        assert documents_of(tmp_path / "out", "train") == DOCUMENTS
        assert index.splits["held_out"].tokens == 0
        assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == [
            "index.json",
            "index.json.sha256",
            "train-00000.bin",
        ]

    @pytest.mark.parametrize(("share", "empty"), [(1e-9, "held_out"), (1 - 1e-9, "train")])
    def test_an_empty_split_names_a_share_that_works(self, tmp_path: Path, share: float, empty: str) -> None:
        source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:20])
        message = f"the {empty} split is empty: the hashes of the 20 distinct documents put none there at --held-out"
        with pytest.raises(ConfigError, match=message) as caught:
            prepare([source], tmp_path / "out", held_out=share)
        assert not (tmp_path / "out").exists()
        suggested = float(str(caught.value).split("set --held-out to ")[1].split(" ")[0])
        index = prepare([source], tmp_path / "out", held_out=suggested)
        assert index.splits["train" if empty == "train" else "held_out"].documents == 1

    @pytest.mark.parametrize(("share", "empty"), [(1e-9, "held_out"), (1 - 1e-9, "train")])
    def test_one_document(self, tmp_path: Path, share: float, empty: str) -> None:
        (tmp_path / "a.txt").write_text("a")
        (tmp_path / "b.txt").write_text("a")
        message = f"the {empty} split is empty: there is one distinct document, and .* set --held-out to 0"
        with pytest.raises(ConfigError, match=message):
            prepare([tmp_path], tmp_path / "out", held_out=share)


class TestOutput:
    def test_index_describes_the_files(self, tmp_path: Path) -> None:
        source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
        index = prepare([source], tmp_path / "out", held_out=0.2, shard_tokens=100)
        assert read_index(tmp_path / "out") == index
        assert (index.tokenizer, index.vocab_size, index.dtype, index.format_version) == ("byte", 257, "uint16", 1)
        names = {"index.json", "index.json.sha256"}
        for split, entry in index.splits.items():
            texts = documents_of(tmp_path / "out", split)
            assert entry.documents == len(texts)
            assert entry.text_bytes == sum(map(len, texts)) == entry.tokens - len(texts)
            assert all(shard.tokens == 100 for shard in entry.shards[:-1])
            for number, shard in enumerate(entry.shards):
                raw = (tmp_path / "out" / shard.file).read_bytes()
                assert shard.file == f"{split}-{number:05d}.bin"
                assert shard.bytes == len(raw) == 2 * shard.tokens
                assert shard.sha256 == hashlib.sha256(raw).hexdigest()
                names.add(shard.file)
        assert {entry.name for entry in (tmp_path / "out").iterdir()} == names

    def test_shard_size_does_not_change_the_tokens(self, tmp_path: Path) -> None:
        source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:30])
        streams = []
        for shard_tokens in (1, 7, 64, 1 << 20):
            out = tmp_path / str(shard_tokens)
            prepare([source], out, held_out=0, shard_tokens=shard_tokens)
            dataset = TokenDataset(out, "train")
            streams.append(dataset.read(0, dataset.num_tokens).tolist())
        assert all(stream == streams[0] for stream in streams)

    def test_same_input_same_bytes(self, tmp_path: Path) -> None:
        source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
        for out in (tmp_path / "1", tmp_path / "2"):
            prepare([source], out, shard_tokens=500)
        for path in (tmp_path / "1").iterdir():
            assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()

    def test_used_folder_is_refused(self, tmp_path: Path) -> None:
        source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
        out = tmp_path / "deep" / "out"
        prepare([source], out)
        before = read_index(out)
        with pytest.raises(ConfigError, match=r"out .*/out exists and is not empty; .* replace it with --overwrite"):
            prepare([source], out, held_out=0.5)
        assert read_index(out) == before
        after = prepare([source], out, held_out=0.5, overwrite=True)
        assert read_index(out) == after != before
        assert [entry.name for entry in out.parent.iterdir()] == ["out"]
        with pytest.raises(ConfigError, match=r"out .*a\.jsonl is a file; name a folder"):
            prepare([source], source, overwrite=True)

    def test_empty_folder_is_used(self, tmp_path: Path) -> None:
        source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
        (tmp_path / "out").mkdir()
        prepare([source], tmp_path / "out")
        assert TokenDataset(tmp_path / "out", "train").num_tokens > 0

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["notes.txt", "index.json"], r"it has notes\.txt"),
            (["index.json", "weights.bin"], r"it has weights\.bin"),
            (["train-00000.bin"], r"it has no index\.json"),
        ],
    )
    def test_only_a_dataset_is_replaced(self, tmp_path: Path, names: list[str], message: str) -> None:
        source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
        (tmp_path / "out").mkdir()
        for name in names:
            (tmp_path / "out" / name).write_text("mine")
        with pytest.raises(ConfigError, match=r"is not replaced, since it is not \(only\) a dataset: " + message):
            prepare([source], tmp_path / "out", overwrite=True)
        assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == sorted(names)

    @pytest.mark.parametrize("failing", ["append", "finish", "index", "rename"])
    @pytest.mark.parametrize("existing", [False, True])
    def test_interrupted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, existing: bool) -> None:
        source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
        out = tmp_path / "out"
        before: DatasetIndex | None = prepare([source], out) if existing else None
        calls = 0

        def fail(*_args: Any, **_kwargs: Any) -> None:
            raise KeyboardInterrupt

        def fail_later(self: ShardWriter, tokens: Any, *, text_bytes: int) -> None:
            nonlocal calls
            calls += 1
            if calls == 100:
                raise OSError("disk full")
            append(self, tokens, text_bytes=text_bytes)

        append, rename = ShardWriter.append, Path.rename

        def fail_to_publish(path: Path, target: Path) -> Path:
            if target == out and path.name.endswith(".tmp") and not path.name.endswith(".old.tmp"):
                raise OSError("stale handle")
            return rename(path, target)

        match failing:
            case "append":
                monkeypatch.setattr(ShardWriter, "append", fail_later)
            case "finish":
                monkeypatch.setattr(os, "fsync", fail)
            case "index":
                monkeypatch.setattr(sys.modules[prepare.__module__], "write_index", fail)
            case "rename":
                monkeypatch.setattr(Path, "rename", fail_to_publish)
        with pytest.raises((KeyboardInterrupt, OSError)):
            prepare([source], out, held_out=0.5, shard_tokens=50, overwrite=existing)
        names = [entry.name for entry in tmp_path.iterdir()]
        assert sorted(names) == (["a.jsonl", "out"] if existing else ["a.jsonl"])
        if existing:
            assert read_index(out) == before


def test_one_document_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    events: list[str] = []
    append, encode = ShardWriter.append, ByteTokenizer.encode

    def record_append(self: ShardWriter, tokens: Any, *, text_bytes: int) -> None:
        events.append("append")
        append(self, tokens, text_bytes=text_bytes)

    def record_encode(self: ByteTokenizer, text: str | bytes) -> Any:
        events.append("encode")
        return encode(self, text)

    monkeypatch.setattr(ShardWriter, "append", record_append)
    monkeypatch.setattr(ByteTokenizer, "encode", record_encode)
    prepare([source], tmp_path / "out")
    assert events == ["encode", "append"] * len(DOCUMENTS)


def test_imports_no_torch() -> None:
    code = "import sys, lhcp.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
