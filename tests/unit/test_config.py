"""Every wrong configuration ends in one ConfigError that names the key and what is valid."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import yaml

from lhcp import config_file
from lhcp.config import ConfigError, LighthouseConfig, RunConfig, legal_num_strata
from lhcp.config.lighthouse import _resolved
from lhcp.presets import MODEL_PRESETS

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "launch" / "configs" / "demo.yaml"
SMALLEST = """\
output_dir: runs/x
seq_len: 8192
global_batch_size: 2
model: {preset: tiny}
data: {path: data/x}
stages: [{mode: lighthouse, steps: 3}, {mode: dense, steps: 2}]
attention: {topk: 192, num_strata: 8}
parallel: {cp: 2}
"""


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(SMALLEST)
    return path


def message_of(path: Path, *overrides: str, world_size: int = 2) -> str:
    """The error of loading `path`, checked to be free of pydantic's own words."""
    with pytest.raises(ConfigError) as caught:
        config_file.load(path, overrides).resolve(world_size)
    message = str(caught.value)
    assert not re.search(r"pydantic|https?:|Input should|type=", message)
    return message


# Overrides of SMALLEST, and the whole message or fragments of it.
WRONG_VALUES: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (
        ["optim.lrr=1"],
        ["optim.lrr: unknown key; did you mean 'lr'? valid in optim: lr, warmup_steps, betas, eps, "],
    ),
    "unknown top-level key": (["seqlen=1"], ["seqlen: unknown key; did you mean 'seq_len'? valid: output_dir, "]),
    "unknown key of a list item": (
        ["stages.1.step=3"],
        ["stages.1.step: unknown key; did you mean 'steps'? valid in stages.1: mode, steps"],
    ),
    "unknown section": (["optimizer.lr=1"], ["optimizer: unknown key; did you mean 'optim'? valid: "]),
    "nothing close": (["zzz=1"], ["zzz: unknown key; valid: output_dir, seq_len, "]),
    "unknown key beside a preset": (["model.width=3"], ["model.width: unknown key; ", "valid in model: preset, "]),
    "not a number": (["optim.lr=fast"], ["optim.lr: given 'fast', must be a number"]),
    "not a whole number": (["seq_len=1.5"], ["seq_len: given 1.5, must be a whole number"]),
    "nothing": (["seq_len="], ["seq_len: given nothing, must be a whole number"]),
    "not true or false": (["attention.cover_prefix=maybe"], ["given 'maybe', must be true or false"]),
    "a number for true": (["data.verify=1"], ["data.verify: given 1, must be true or false"]),
    "not a path": (["output_dir=[1]"], ["output_dir: given [1], must be a path"]),
    "not a list": (["dense_layers=x"], ["dense_layers: given 'x', must be a list"]),
    "item of a list": (["dense_layers=[0, x]"], ["dense_layers.1: given 'x', must be a whole number"]),
    "too few items": (["stages=[]"], ["stages: given [], must have at least 1 item(s)"]),
    "too many items": (["optim.betas=[0, 0, 0]"], ["optim.betas: given [0, 0, 0], must have at most 2 item(s)"]),
    "below the least": (["global_batch_size=0"], ["global_batch_size: given 0, must be at least 1"]),
    "not above": (["optim.grad_clip=0"], ["optim.grad_clip: given 0, must be greater than 0"]),
    "above the most": (["attention.num_levels=13"], ["attention.num_levels: given 13, must be at most 12"]),
    "not below": (["optim.betas=[0.9, 1]"], ["optim.betas.1: given 1, must be less than 1"]),
    "odd head": (["model.head_dim=33"], ["model.head_dim: given 33, must be a multiple of 2"]),
    "no such choice": (["dtype=bf16"], ["dtype: given 'bf16', must be 'float32' or 'float64'"]),
    "no such mode": (["stages.0.mode=sparse"], ["stages.0.mode: given 'sparse', must be 'lighthouse' or 'dense'"]),
    "not a section": (["optim=3"], ["optim: given 3, must be a section with the keys lr, warmup_steps, "]),
    "empty section": (["optim="], ["optim: given nothing, must be a section with the keys lr, "]),
    "preset as text": (["model=tiny"], ["model: given 'tiny', must be a section with the keys preset, vocab_size, "]),
    "missing key": (["stages=[{mode: dense}]"], ["stages.0.steps: required"]),
    "missing keys": (["model={dim: 8}"], ["model.vocab_size: required\n", "\nmodel.ffn_dim: required"]),
    "unknown preset": (
        ["model.preset=tinny"],
        ["model.preset: given 'tinny', must be one of: tiny, llama-530m; did you mean 'tiny'?"],
    ),
    "preset of another type": (["model.preset=[tiny]"], ["model.preset: given ['tiny'], must be one of: tiny, "]),
    "unknown RoPE": (
        ["model.rope_scaling={type: yarn}"],
        ["model.rope_scaling.type: given 'yarn', must be 'linear' or 'llama3'"],
    ),
    "no RoPE type": (
        ["model.rope_scaling.factor=3"],
        ["model.rope_scaling.type: required, must be 'linear' or 'llama3'"],
    ),
    "RoPE as a number": (
        ["model.rope_scaling=3"],
        ["model.rope_scaling: given 3, must be a section with type: 'linear' or 'llama3'"],
    ),
    "missing key of a RoPE": (["model.rope_scaling={type: linear}"], ["model.rope_scaling.factor: required"]),
    "unknown key of a RoPE": (
        ["model.rope_scaling={type: linear, factor: 2, factr: 3}"],
        ["model.rope_scaling.factr: unknown key; did you mean 'factor'? valid in model.rope_scaling: type, factor"],
    ),
    "unknown key of the other RoPE": (
        [
            "model.rope_scaling={type: llama3, factor: 2, low_freq_factor: 1, high_freq_factor: 4, "
            "original_max_position_embeddings: 8192, base: 3}"
        ],
        ["model.rope_scaling.base: unknown key; valid in model.rope_scaling: type, factor, low_freq_factor, "],
    ),
    "value of a RoPE": (
        ["model.rope_scaling={type: linear, factor: fast}"],
        ["model.rope_scaling.factor: given 'fast', must be a number"],
    ),
    "limit of a RoPE": (
        ["model.rope_scaling={type: linear, factor: 0.5}"],
        ["model.rope_scaling.factor: given 0.5, must be at least 1"],
    ),
    "order in a RoPE": (
        [
            "model.rope_scaling={type: llama3, factor: 2, low_freq_factor: 4, high_freq_factor: 4, "
            "original_max_position_embeddings: 8192}"
        ],
        ["model.rope_scaling: high_freq_factor 4 must be greater than low_freq_factor 4"],
    ),
    "tied as a number": (["model.tie_embeddings=1"], ["model.tie_embeddings: given 1, must be true or false"]),
    "heads": (["model.num_kv_heads=3"], ["num_kv_heads 3 does not divide num_heads 2; valid: [1, 2]"]),
    "long value": (["dtype=" + "x" * 500], ["dtype: given 'xxx", "..., must be 'float32' or"]),
    # Several sections at once, checked by resolve.
    "topk and strata": (
        ["attention.num_strata=7"],
        ["num_strata 7 is not legal: it does not divide topk 192; valid: [4, 8, 16, 32, 64]"],
    ),
    "budget of one": (["attention.num_strata=192"], ["num_strata 192 is not legal: ", "; valid: [4, 8, "]),
    "strata and cp": (
        ["attention.num_strata=2"],
        [
            "num_strata 2 is not legal: it does not divide evenly over the 4 chunks of the context-parallel layout",
            "valid: [4, 8, ",
        ],
    ),
    "no legal strata": (["attention.topk=1024"], ["topk 1024 exceeds the 512 coarsest entries of seq_len 8192"]),
    "no strata to derive": (
        ["attention.num_strata=", "attention.topk=190"],
        ["no multiple of 2 x max_cp = 16 is legal for topk 190; none is valid here: topk must be a multiple of 8"],
    ),
    "batch": (
        ["global_batch_size=3", "micro_batch_size=2"],
        ["global_batch_size 3 is not a multiple of dp 1 x micro_batch_size 2; nearest legal: 2 or 4"],
    ),
    "processes": (["parallel.dp=2"], ["parallel.dp 2 x parallel.cp 2 does not match 2 process(es); start 4,"]),
    "cp and processes": (["parallel.cp=3"], ["parallel.cp 3 does not match 2 process(es); start a multiple of 3,"]),
    "backend and device": (
        ["parallel.block_backend=cudnn", "device=cpu"],
        ["parallel.block_backend cudnn does not take float32 on device cpu; use auto or math"],
    ),
    "package's ring": (
        ["parallel={cp: 2, exchange: ring_flash_attn, sharding: contiguous, block_backend: math}", "device=cpu"],
        [
            "parallel.exchange ring_flash_attn does not go with parallel.sharding contiguous or parallel.block_backend "
            "math or activations in float32 or device cpu: it takes zigzag sharding, compute_dtype: bfloat16 and "
            "heads of 8 to 256 in steps of 8 on GPUs"
        ],
    ),
    "package's ring on CPUs": (
        ["parallel.exchange=ring_flash_attn", "compute_dtype=bfloat16", "device=cpu"],
        ["not go with device cpu: it"],
    ),
    "heads of ulysses": (["parallel.exchange=ulysses", "model.num_heads=3"], ["'ulysses' shares 3 query and 1 KV h"]),
    "seed too large": (["seed=9223372036854775808"], ["seed: given 9223372036854775808, must be less than"]),
    "true as a number": (["seq_len=true"], ["seq_len: given True, must be a whole number"]),
    "layer outside": (["dense_layers=[0, 4, 5]"], ["dense_layers [4, 5]: the model's layers are 0 to 3"]),
}


@pytest.mark.parametrize(("overrides", "fragments"), WRONG_VALUES.values(), ids=WRONG_VALUES.keys())
def test_wrong_value(smallest: Path, overrides: list[str], fragments: list[str]) -> None:
    message = message_of(smallest, *overrides)
    for fragment in fragments:
        assert fragment in message
    assert len(message.splitlines()) == message.count("required") or "\n" not in message
    assert all(len(line) < 400 for line in message.splitlines())


WRONG_OVERRIDES = {
    "optim.lr": "override 'optim.lr': must be KEY=VALUE, such as optim.lr=0.001",
    "=3": "override '=3': must be KEY=VALUE, such as optim.lr=0.001",
    "optim..lr=3": "override 'optim..lr=3': must be KEY=VALUE, such as optim.lr=0.001",
    "seq_len.x=3": "override 'seq_len.x=3': seq_len is 8192, not a section",
    "optim.lr.x=3": "override 'optim.lr.x=3': optim.lr is not a section or a list in the file; set optim.lr as a whole",
    "optim.betas.0=0.5": "override 'optim.betas.0=0.5': optim.betas is not a section or a list in the file; "
    "set optim.betas as a whole",
    "model.rope_scaling.factor.x=3": "override 'model.rope_scaling.factor.x=3': model.rope_scaling.factor is not a "
    "section or a list in the file; set model.rope_scaling.factor as a whole",
    "stages.2.steps=5": "override 'stages.2.steps=5': '2' is not an index of the list stages; valid: 0 to 1",
    "stages.-1.steps=5": "override 'stages.-1.steps=5': '-1' is not an index of the list stages; valid: 0 to 1",
    "stages.all=5": "override 'stages.all=5': 'all' is not an index of the list stages; valid: 0 to 1",
    "seq_len=[1": "override 'seq_len=[1', line 1: expected ',' or ']', but got '<stream end>'",
    "data={path: a, path: b}": "override 'data={path: a, path: b}', line 1: 'path' is given twice",
}


@pytest.mark.parametrize(("override", "message"), WRONG_OVERRIDES.items(), ids=WRONG_OVERRIDES.keys())
def test_wrong_override(smallest: Path, override: str, message: str) -> None:
    assert message_of(smallest, override) == message


# The file's bytes, and what follows its path in the message.
WRONG_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"# nothing\n", ": given nothing at the top level, must be a mapping (key: value)"),
    "list": (b"- 1\n", ": given [1] at the top level, must be a mapping (key: value)"),
    "not YAML": (b"a: 1\nb: [1, 2\nc: 3\n", ", line 3: expected ',' or ']', but got ':'"),
    "tab": (b"a:\n\tb: 1\n", ", line 2: found character '\\t' that cannot start any token"),
    "two documents": (b"a: 1\n---\nb: 2\n", ", line 2: but found another document"),
    "duplicate key": (b"seq_len: 1\nseed: 3\nseq_len: 2\n", ", line 3: 'seq_len' is given twice"),
    "duplicate inner key": (b"optim:\n  lr: 1\n  eps: 1\n  lr: 2\n", ", line 4: 'lr' is given twice"),
    "unknown alias": (b"a: 1\nb: *c\n", ", line 2: found undefined alias 'c'"),
    "unknown tag": (b"a: !path b\n", ", line 1: could not determine a constructor for the tag '!path'"),
    "list as key": (b"a: 1\n? [b]\n: 2\n", ", line 2: found unhashable key"),
    "control character": (b"a: 1\nb: \x01\n", ", line 2: not YAML (character U+0001)"),
    "no such date": (b"a: 2026-99-99\n", ": not YAML (month must be in 1..12"),
    "not text": (b"\xff\xfe\x00", ": not UTF-8 text"),
}


@pytest.mark.parametrize(("content", "message"), WRONG_FILES.values(), ids=WRONG_FILES.keys())
def test_wrong_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    found = message_of(path)
    assert found.startswith(f"{path}{message}")
    assert "\n" not in found


def test_missing_file(tmp_path: Path) -> None:
    assert message_of(tmp_path / "no.yaml") == f"{tmp_path / 'no.yaml'}: no such file"
    assert message_of(tmp_path) == f"{tmp_path}: cannot be read (Is a directory)"


def test_each_error_has_its_line(smallest: Path) -> None:
    message = message_of(smallest, "seq_len=0", "optim.lrr=1", "dtype=half", "stages.0.steps=")
    assert [line.split(":")[0] for line in message.splitlines()] == ["seq_len", "dtype", "stages.0.steps", "optim.lrr"]


def test_keys_that_are_not_text(smallest: Path) -> None:
    smallest.write_text(SMALLEST + "1: 2\n")
    assert message_of(smallest).startswith("1: unknown key; valid: output_dir, ")


def test_preset_is_the_start(smallest: Path) -> None:
    assert config_file.load(smallest).model == MODEL_PRESETS["tiny"]
    changed = config_file.load(smallest, ["model.dim=64"]).model
    assert changed == MODEL_PRESETS["tiny"].model_copy(update={"dim": 64})


def test_overrides(smallest: Path) -> None:
    config = config_file.load(
        smallest, ["stages.1.steps=7", "optim.lr=3e-4", "optim.betas=[0.8, 0.9]", "parallel.dp=4", "parallel.dp="]
    )
    assert [stage.steps for stage in config.stages] == [3, 7]
    assert (config.optim.lr, config.optim.betas, config.parallel.dp) == (3e-4, (0.8, 0.9), None)
    assert config_file.load(smallest, ["output_dir=a=b"]).output_dir == Path("a=b")


def test_override_of_an_alias_leaves_the_other(smallest: Path) -> None:
    stages = "stages: [&stage {mode: dense, steps: 2}, *stage]\n"
    smallest.write_text(re.sub(r"stages: .*\n", stages, SMALLEST))
    assert [s.steps for s in config_file.load(smallest, ["stages.0.steps=9"]).stages] == [9, 2]


def test_merge_keys_are_not_duplicates(smallest: Path) -> None:
    stages = "stages: [&stage {mode: dense, steps: 2}, {<<: *stage, steps: 4}]\n"
    smallest.write_text(re.sub(r"stages: .*\n", stages, SMALLEST))
    assert [s.steps for s in config_file.load(smallest).stages] == [2, 4]


def test_saved_configuration_loads_equal(smallest: Path, tmp_path: Path) -> None:
    config = config_file.load(smallest, ["optim.eps=1e-12", "output_dir='5'", "dense_layers=[0, 3]"])
    for each in (config, config.resolve(2)):
        (tmp_path / "saved.yaml").unlink(missing_ok=True)
        config_file.save(each, tmp_path / "saved.yaml")
        assert config_file.load(tmp_path / "saved.yaml") == each
    with pytest.raises(FileExistsError):
        config_file.save(config, tmp_path / "saved.yaml")


def test_example_loads() -> None:
    config = config_file.load(EXAMPLE).resolve(2)
    assert (config.parallel.cp, config.parallel.dp, config.seq_len, config.device) == (2, 1, 8192, "cpu")
    assert (config.attention.num_levels, config.attention.pooling_factor) == (3, 4)
    assert (config.attention.topk, config.attention.strata) == (192, 8)
    assert [(stage.mode, stage.steps) for stage in config.stages] == [("lighthouse", 130), ("dense", 60)]


def test_example_has_every_key() -> None:
    """But those of the model behind its preset."""

    def keys(section: object, prefix: str = "") -> set[str]:
        if not isinstance(section, dict):
            return {prefix}
        return set().union(*(keys(value, f"{prefix}.{key}") for key, value in section.items()))

    complete = keys(config_file.load(EXAMPLE).model_dump(mode="json"))
    given = keys(yaml.safe_load(EXAMPLE.read_text()))
    assert {key for key in complete - given if not key.startswith(".model.")} == set()


def test_example_explains_every_key() -> None:
    lines = EXAMPLE.read_text().splitlines()
    keys = [line for line in lines if re.match(r"\s*(- )?\w+: *[^ #]", line)]
    assert len(keys) > 25
    assert [line for line in keys if "#" not in line] == []


def test_resolve_fixes_what_is_derived(smallest: Path) -> None:
    config = config_file.load(smallest, ["parallel.cp=1", "global_batch_size=4", "attention.num_strata="])
    resolved = config.resolve(4)
    assert (resolved.parallel.dp, resolved.attention.num_strata) == (4, 16)
    assert resolved.resolve(4) == resolved
    assert LighthouseConfig(topk=1536).resolve(98_304).num_strata == 16


def test_dense_run_needs_no_legal_selection(smallest: Path) -> None:
    config = config_file.load(smallest, ["stages=[{mode: dense, steps: 1}]", "seq_len=36"])
    assert config.resolve(2).seq_len == 36


def test_legal_num_strata_are_those_that_resolve() -> None:
    legal = legal_num_strata(LighthouseConfig(topk=48), 1536)
    for strata in range(1, 100):
        config = LighthouseConfig(topk=48, num_strata=strata)
        if strata in legal:
            assert config.resolve(1536).strata == strata
        else:
            with pytest.raises(ConfigError, match=f"num_strata {strata} is not legal"):
                config.resolve(1536)


def test_a_resolved_configuration_is_kept_where_it_is_legal_and_refused_where_not() -> None:
    """A layer asks at every call, so there is a short way: it must say what the long one does."""
    kept = refused = 0
    for levels, topk, strata, seq_len, num_chunks, dilation in itertools.product(
        (2, 3), (4, 6, 16, 40), (1, 2, 3, 4, 8), (96, 100, 128, 360, 720), (1, 2, 4), (None, 4, 5)
    ):
        scorer = {"scorer": "dilated", "dilation": dilation} if dilation else {}
        config = LighthouseConfig(num_levels=levels, pooling_factor=3, topk=topk, num_strata=strata, **scorer)
        try:
            expected = _resolved.__wrapped__(config, seq_len, num_chunks)
        except ConfigError as error:
            with pytest.raises(ConfigError, match=re.escape(str(error))):
                config.resolve(seq_len, num_chunks)
            refused += 1
        else:
            assert config.resolve(seq_len, num_chunks) is config
            assert expected == config
            kept += 1
    assert kept > 50 < refused


def test_stage_at(smallest: Path) -> None:
    config: RunConfig = config_file.load(smallest)
    assert [config.stage_at(step).mode for step in range(config.total_steps)] == ["lighthouse"] * 3 + ["dense"] * 2


@pytest.mark.parametrize(("seq_len", "topk", "max_cp", "expected"), [(98_304, 1536, 8, 16), (98_304, 1536, 12, 24)])
def test_the_default_num_strata_is_that_of_the_design(seq_len: int, topk: int, max_cp: int, expected: int) -> None:
    config = LighthouseConfig(topk=topk, max_cp=max_cp)
    assert {config.resolve(seq_len, chunks).num_strata for chunks in (1, 2, 4, 8)} == {expected}


def test_the_default_num_strata_never_depends_on_the_layout() -> None:
    """6 chunks do not divide 16 strata: an error, not another number that would select otherwise."""
    config = LighthouseConfig(topk=1536)
    assert config.resolve(98_304).num_strata == 16
    with pytest.raises(ConfigError, match=r"num_strata 16 is not legal: it does not divide evenly over the 6 chunks"):
        config.resolve(98_304, 6)
