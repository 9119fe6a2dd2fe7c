"""Every Triton kernel compiles for the GPUs that matter and fits them: no GPU needed."""

from __future__ import annotations

import json
import pkgutil
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import resources
from benchmarks.common import Record
from lhcp.distributed.exchange import merge_kernel
from lhcp.kernels import lighthouse

VARIANTS = {
    "_pool_kernel": {"pool + score", "pool", "pool, shifted"},
    "_select_kernel": {"select"},
    "_gather_kernel": {"gather", "gather, shifted"},
    "_spread_kernel": {"spread", "spread, shifted", "spread, shifted, halo"},
    "_merge_kernel": {"merge", "merge, more"},
    "_add_kernel": {"add", "add, more"},
}
# Bytes. To fit one more block on a multiprocessor, ptxas parks a few of a thread's registers; in which kernels it does,
# changes with its version (at most 8 in Triton 3.6 and 3.7). A tile that is too large for the registers takes hundreds.
STACK = {"_pool_kernel": 16, "_select_kernel": 16}
SHARED = 227 * 1024
"""Of a block, on both architectures."""


@pytest.fixture(scope="module")
def found() -> list[Record]:
    return resources.measure()


def test_every_kernel_and_variant_compiles_for_both_architectures(found: list[Record]) -> None:
    modules = [
        import_module(f"{lighthouse.__name__}.{name}") for _, name, _ in pkgutil.iter_modules(lighthouse.__path__)
    ]
    modules.append(merge_kernel)
    assert {name for module in modules for name in vars(module) if name.endswith("_kernel")} == set(VARIANTS)
    compiled = {(record["kernel"], record["variant"], record["case"], record["arch"]) for record in found}
    assert compiled == {
        (kernel, variant, case.name, arch)
        for kernel, variants in VARIANTS.items()
        for variant in variants
        for case in resources.CASES
        for arch in ("sm_90", "sm_100")
    }
    assert {record["dtype"] for record in found} == {"bfloat16", "float16", "float32"}


def test_every_kernel_fits(found: list[Record]) -> None:
    large = [
        record
        for record in found
        if record["registers"] > 255
        or record["stack_bytes"] > STACK.get(record["kernel"], 0)
        or record["shared_bytes"] > SHARED
    ]
    assert not large


def test_a_launch_is_specialized_as_triton_does_it() -> None:
    """A stride above int32's largest, 1 as a constant, and no divisibility where there is none."""
    launch = next(launch for launch in resources.launches(resources.CASES[1]) if launch.variant == "pool + score")
    source, options = resources.specialized(launch)
    assert source.signature["x"] == "*bf16"
    assert source.signature["stride_batch"] == "i64"
    assert source.signature["tokens"] == "i32"
    assert source.signature["chunks"] == "constexpr"
    names = launch.kernel.arg_names
    assert source.constants[names.index("chunks"),] == 1
    divisible = {names[index] for (index,) in source.attrs}
    assert {"x", "stride_batch", "tokens"} <= divisible
    assert not {"chunks", "groups"} & divisible
    assert options == {"num_warps": 4}


def test_the_result_is_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resources, "measure", lambda: [{"kernel": "_pool_kernel", "arch": "sm_90", "registers": 64}])
    assert resources.main([]) == 0
    printed = capsys.readouterr().out
    assert "| _pool_kernel | sm_90 |        64 |" in printed
    assert resources.main(["--out", str(tmp_path / "x.json")]) == 0
    assert capsys.readouterr().out == printed
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["kernels"] == resources.measure()
    assert "triton" in result["environment"]["versions"]
    assert [case["name"] for case in result["cases"]] == [case.name for case in resources.CASES]


def test_what_the_user_can_correct_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert resources.main(["--out", str(tmp_path / "file" / "x.json")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resources.main([]) == 2
    assert capsys.readouterr().err == "error: TRITON_INTERPRET is set, so nothing would be compiled; unset it\n"
