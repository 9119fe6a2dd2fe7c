"""Lengths that sequences are padded to, and what is refused whatever the padding."""

from __future__ import annotations

from pathlib import Path

import pytest

from lhcp import config_file
from lhcp.config import ConfigError
from lhcp.flops import step_flops

DEMO = Path(__file__).parents[2] / "launch" / "configs" / "demo.yaml"  # 8,192 tokens, 8 strata, windows of 16, cp 2


@pytest.mark.parametrize(
    ("overrides", "padded"),
    [
        (["seq_len=8192"], 8192),
        (["seq_len=8191"], 8192),
        (["seq_len=8193"], 8320),  # 8 strata of 16 tokens
        (["seq_len=8190", "stages=[{mode: dense, steps: 1}]", "eval.modes=[dense]"], 8192),  # 4 chunks
        (["seq_len=8190", "stages=[{mode: dense, steps: 1}]", "eval.modes=[lighthouse]"], 8192),
        (["seq_len=3200", "attention.num_strata=64"], 4096),
        (["seq_len=8193", "attention.num_strata="], 8448),  # derived: 16 strata
        (["seq_len=8193", "attention.scorer=dilated", "attention.dilation=3"], 8448),  # 8 strata of 48 tokens
    ],
)
def test_any_length_is_padded_to_a_legal_one(overrides: list[str], padded: int) -> None:
    config = config_file.load(DEMO, overrides)
    assert config.padded_len == padded
    assert config.resolve(2).padded_len == padded
    if "lighthouse" in {*config.eval.modes, *(stage.mode for stage in config.stages)}:
        other = config.model_copy(update={"parallel": config.parallel.model_copy(update={"cp": 4})})
        assert other.resolve(4).padded_len == padded


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["seq_len=4032", "attention.num_strata=6"],
            "num_strata 6 is not legal: it does not divide evenly over the 4 chunks of the context-parallel layout "
            "(a chunk is a whole number of strata); valid: [4, 12]",
        ),
        (
            ["seq_len=4000", "attention.topk=100"],
            "num_strata 8 is not legal: it does not divide topk 100; valid: [4, 20]",
        ),
        (
            ["seq_len=1001"],
            "topk 192 exceeds the 64 coarsest entries of seq_len 1001 (padded to 1024) (num_levels 3, pooling_factor "
            "4); it must be at most that, or seq_len at least 3072",
        ),
    ],
)
def test_what_no_padding_mends_is_refused_in_words_of_the_user(overrides: list[str], message: str) -> None:
    """Not of a length that was never given."""
    with pytest.raises(ConfigError) as caught:
        config_file.load(DEMO, overrides).resolve(2)
    assert str(caught.value) == message


def test_flops_of_lighthouse_are_those_of_the_padded_length() -> None:
    """Matrix products count real tokens; the sub-sequence is that of the padded sequence."""
    config = config_file.load(DEMO, ["seq_len=8191"]).resolve(2)
    n, batch, layers, dense = 8191, config.global_batch_size, config.model.num_layers, len(config.dense_layers)
    width = config.model.num_heads * config.model.head_dim
    products = step_flops(config, "dense") - 6 * batch * width * layers * n**2  # 3 x 4 x N^2 / 2 a layer
    sub = config.attention.subsequence_length(8192)
    expected = products + 6 * batch * width * (dense * n**2 + (layers - dense) * sub**2)
    assert step_flops(config, "lighthouse") == pytest.approx(expected, rel=1e-12)
