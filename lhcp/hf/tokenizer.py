"""The byte-level tokenizer as files that Hugging Face's tokenizers read. Needs none of their libraries."""

from __future__ import annotations

from typing import Any

from lhcp.data.tokenizer import ByteTokenizer

EOS = "<|endoftext|>"
"""How Hugging Face writes the end of a document."""


def tokenizer_files(seq_len: int) -> dict[str, dict[str, Any]]:
    """The content of each file by its name, for a model trained for `seq_len` positions.

    `transformers.AutoTokenizer` reads them as a tokenizer whose ids of any text are `ByteTokenizer`'s.
    """
    return {
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": EOS,
            "model_max_length": seq_len,
            "clean_up_tokenization_spaces": False,
            # Text that spells the end of a document is only text.
            "split_special_tokens": True,
        },
        "special_tokens_map.json": {"eos_token": EOS},
    }


def _tokenizer() -> dict[str, Any]:
    """Byte-pair encoding without a single merge, on bytes that are written as characters."""
    characters = _byte_characters()
    vocab = {character: byte for byte, character in enumerate(characters)} | {EOS: ByteTokenizer.eos_id}
    end = {"id": ByteTokenizer.eos_id, "content": EOS, "special": True, "normalized": False}
    exactly = {"single_word": False, "lstrip": False, "rstrip": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | exactly],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        },
    }


def _byte_characters() -> list[str]:
    """The character by which ByteLevel writes each byte (GPT-2's): itself if printable in Latin-1, else from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]
