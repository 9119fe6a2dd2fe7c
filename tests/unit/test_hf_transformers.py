"""What transformers makes of an export, and lhcp of what transformers writes. Importing transformers is slow."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lhcp.config import ModelConfig
from lhcp.data import ByteTokenizer
from lhcp.hf.config import from_hf, to_hf
from lhcp.hf.export import export_model
from lhcp.hf.importer import import_model
from saved import read_all
from saved_models import MODELS, PLAIN, assert_same, dense_logits, random_model, save_model, tensors_of


def exported(config: ModelConfig, folder: Path, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """A random model, by way of a checkpoint and an export."""
    checkpoint = save_model(config, folder / "checkpoint", tensors_of(random_model(config, seed)))
    export_model(checkpoint, folder / "hf", **options)
    model, info = LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two logits over the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
@torch.no_grad()
def test_transformers_computes_the_same_logits(tmp_path: Path, config: ModelConfig) -> None:
    tokens = torch.randint(0, 257, (2, 400), generator=torch.Generator().manual_seed(1))
    found = exported(config, tmp_path)(tokens).logits
    expected = dense_logits(random_model(config), tokens)
    assert largest_difference(found, expected) < 1e-4
    # The text is long enough to tell one RoPE from another.
    other = random_model(config.model_copy(update={"rope_scaling": None, "rope_theta": config.rope_theta * 1.01}))
    assert largest_difference(dense_logits(other, tokens), expected) > 1e-2


@torch.no_grad()
def test_transformers_generates_the_same_text(tmp_path: Path) -> None:
    ours, theirs = random_model(PLAIN, seed=3), exported(PLAIN, tmp_path, seed=3)
    theirs.generation_config.eos_token_id = None
    prompt = torch.randint(0, 257, (1, 8), generator=torch.Generator().manual_seed(3))
    found = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=256)
    tokens, margin = prompt, float("inf")
    for _ in range(256):
        last = dense_logits(ours, tokens)[0, -1]
        best = last.topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        tokens = torch.cat((tokens, best.indices[None, :1]), dim=1)
    assert found.tolist() == tokens.tolist()
    # No step was so close that rounding could have decided it, and the text is no loop of a few tokens.
    assert margin > 30 * float((theirs(tokens).logits - dense_logits(ours, tokens)).abs().max())
    assert len(set(tokens[0].tolist())) > 50


def hf_model(folder: Path, tied: bool, dtype: torch.dtype, **changes: Any) -> dict[str, Tensor]:
    """A random GQA model that transformers writes into `folder`, in several files; its tensors."""
    values = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "head_dim": 10,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 333}  # fmt: skip
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**values, tie_word_embeddings=tied, **changes)).to(dtype)
    model.save_pretrained(folder, max_shard_size="9KB")
    return hf_tensors_in(folder)


def hf_tensors_in(folder: Path) -> dict[str, Tensor]:
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 3
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_transformers_wrote_comes_back(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    original = hf_model(tmp_path / "in", tied, dtype)
    checkpoint = import_model(tmp_path / "in", tmp_path / "checkpoint")
    assert checkpoint.manifest.seq_len == 333
    export_model(checkpoint, tmp_path / "out", max_shard_bytes=9_000)
    found = hf_tensors_in(tmp_path / "out")
    stored = torch.float64 if dtype == torch.float64 else torch.float32
    assert_same(found, {name: tensor.to(stored) for name, tensor in original.items()})
    again = {name: tensor.to(dtype) for name, tensor in found.items()}
    assert_same(again, original)  # exact in the wider dtype
    if dtype == torch.bfloat16:
        export_model(checkpoint, tmp_path / "bf16", dtype="bfloat16", max_shard_bytes=9_000)
        assert_same(hf_tensors_in(tmp_path / "bf16"), original)


@torch.no_grad()
def test_an_imported_model_computes_the_same(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 60}  # fmt: skip
    changes = {"rope_scaling": rope, "rope_theta": 300.0, "rms_norm_eps": 1e-4, "initializer_range": 0.2}
    hf_model(tmp_path / "in", False, torch.float32, **changes)
    checkpoint = import_model(tmp_path / "in", tmp_path / "checkpoint")
    model = random_model(checkpoint.manifest.model)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in read_all(checkpoint).items()})
    tokens = torch.randint(0, 97, (1, 300), generator=torch.Generator().manual_seed(1))
    expected = LlamaForCausalLM.from_pretrained(tmp_path / "in")(tokens).logits
    assert largest_difference(dense_logits(model, tokens), expected) < 1e-4


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_transformers_reads_every_key_as_meant(tmp_path: Path, config: ModelConfig) -> None:
    """What transformers makes of our config.json and writes itself is the same model again."""
    (tmp_path / "config.json").write_text(json.dumps(to_hf(config, 777, "bfloat16", 256)))
    read = AutoConfig.from_pretrained(tmp_path)
    assert (read.dtype, read.eos_token_id, read.bos_token_id) == (torch.bfloat16, 256, None)
    read.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written != to_hf(config, 777, "bfloat16", 256)
    assert from_hf(written) == (config, 777)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    checkpoint = save_model(PLAIN, folder / "checkpoint", tensors_of(random_model(PLAIN)))
    export_model(checkpoint, folder / "hf")
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder / "hf")
    return found


TEXTS = [
    "", " ", "  leading and trailing  ", "\n\n\t\r\n", "\0\x01\x1f\x7f\x80\xad", "don't  we'LL I'm", "ŊĠĊâ", "e\u0301é",
    "👩‍👩‍👧‍👦🏳️‍🌈", "\u2028\ufeff\ufffd\uffff", "<|endoftext|>", "a<|endoftext|> b", "</s><s><unk>",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_tokens_are_bytes(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    check_tokens(tokenizer, text)


@given(st.text() | st.text(alphabet=" \n'abc<|>\0é🙂"))
def test_tokens_of_any_text_are_bytes(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    check_tokens(tokenizer, text)


def check_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = ByteTokenizer().encode(text).tolist()
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text


@given(st.binary())
def test_any_bytes_decode_as_in_lhcp(tokenizer: PreTrainedTokenizerBase, raw: bytes) -> None:
    assert tokenizer.decode(list(raw)) == ByteTokenizer().decode(list(raw))


def test_the_end_of_a_document(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.model_max_length) == (257, 256, 512)
    assert tokenizer.decode([97, 256, 98]) == "a<|endoftext|>b"
    assert tokenizer.decode([97, 256, 98], skip_special_tokens=True) == "ab"


def test_a_megabyte_is_tokenised_in_seconds(tokenizer: PreTrainedTokenizerBase) -> None:
    text = Path(torch.nn.functional.__file__).read_text(encoding="utf-8")
    text = (text * (1_000_000 // len(text) + 1))[:1_000_000]
    started = time.perf_counter()
    ids = tokenizer.encode(text)
    assert (
        time.perf_counter() - started < 20
    )  # half a second, and slower on a busy machine; by merges it would be hours
    assert len(ids) == len(text.encode())
