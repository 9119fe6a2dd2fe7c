"""What every Triton kernel takes of a GPU, as compiled without one: registers, stack and shared memory.

    python -m benchmarks.resources [--out FILE.json]

The launchers are called as in training, with tensors that have a size and no memory, and what they launch is compiled
instead. Exit codes: 0 done, 2 something that the user can correct.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.common import Record, make_way, software, table, write_json
from lhcp.config import ConfigError
from lhcp.distributed.exchange import merge_kernel
from lhcp.distributed.exchange.merge import AT_ONCE, Part
from lhcp.kernels.lighthouse import gather, pool, select
from lhcp.kernels.lighthouse.pyramid import PyramidShape
from lhcp.metrics import tell

NAME = "resources"
ARCHS = (90, 100)
CHUNKS = 2
"""Of the sequence on a rank of a context-parallel group."""
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}


@dataclass(frozen=True)
class Case:
    """Attention of one sequence."""

    name: str
    shape: PyramidShape
    topk: int
    strata: int
    num_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    fused: bool = False
    """Whether the tensors are views of one projection [B, N, 3, H, D]."""


CASES = (
    Case("98k L3", PyramidShape(98_304, 3, 4), 1536, 16),
    # A sequence's stride is more than int32 holds.
    Case("1M L4 fused", PyramidShape(1_048_576, 4, 4), 4096, 32, fused=True),
    # As many candidates as `select` holds at once, 4,096, and more, which it streams.
    Case("64k L2 GQA", PyramidShape(65_536, 2, 4), 1024, 4, num_kv_heads=2, head_dim=64, dtype="float32"),
    Case("1M L2", PyramidShape(1_048_576, 2, 4), 4096, 16),
    Case("108k L4 p3 GQA", PyramidShape(110_592, 4, 3), 1536, 16, 6, 2, head_dim=80, dtype="float16"),
)


@dataclass(frozen=True)
class Launch:
    """What a launcher launches."""

    case: Case
    variant: str
    heads: int
    """Of the tensor that is read."""
    kernel: Any
    values: dict[str, Any]
    """Of the kernel's parameters and of the compiler's options, by name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, write and print; the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.resources", description="Compile every kernel without a GPU.")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    try:
        _main(parser.parse_args(argv).out)
    except ConfigError as error:
        tell(error)
        return 2
    return 0


def _main(out: Path | None) -> None:
    if out:
        make_way(out)
    found = measure()
    if out:
        cases, environment = [asdict(case) for case in CASES], software({"triton": triton.__version__})
        write_json(out, {"benchmark": NAME, "cases": cases, "kernels": found, "environment": environment})
    print(table(list(found[0]), ([str(value) for value in record.values()] for record in found)))
    print(f"Compiled by triton {triton.__version__}. The stack: spills and local arrays.")


def measure() -> list[Record]:
    """What every launch of every case takes, on each architecture.

    Raises:
        ConfigError: Triton does not compile in this process.
    """
    if triton.knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET is set, so nothing would be compiled; unset it")
    # In processes, since Triton holds Python's lock; not forked ones, which torch's threads would harm.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as workers:
        cases, archs = zip(*itertools.product(CASES, ARCHS), strict=True)
        return list(itertools.chain.from_iterable(workers.map(_measured, cases, archs)))


def _measured(case: Case, arch: int) -> list[Record]:
    return [resources(launch, arch) for launch in launches(case)]


def kernels() -> list[tuple[ModuleType, str]]:
    """Where each kernel is found."""
    modules = (pool, select, gather, merge_kernel)
    return [(module, name) for module in modules for name in vars(module) if name.endswith("_kernel")]


def launches(case: Case) -> list[Launch]:
    """What training with `case` launches, every variant."""
    found: list[Launch] = []

    def run(variant: str, launcher: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            stand_ins = [
                (getattr(module, name), stack.enter_context(patch.object(module, name))) for module, name in kernels()
            ]
            out = launcher(x, *args, **kwargs)
        for kernel, stand_in in stand_ins:
            for call in stand_in.__getitem__.return_value.call_args_list:  # of kernel[grid](...)
                values = dict(zip(kernel.arg_names, call.args, strict=False)) | call.kwargs
                found.append(Launch(case, variant, x.shape[-2], kernel, values))
        return out

    shape, groups, dtype = case.shape, case.num_kv_heads, getattr(torch, case.dtype)
    entries = shape.offsets[-1]
    bits, inverse = (
        torch.empty(1, groups, size, dtype=torch.int32, device="meta") for size in (entries - shape.length, entries)
    )
    halo = torch.empty(CHUNKS, shape.num_levels - 1, 1, case.num_heads, case.head_dim, device="meta")
    rows = run("select", select.select, bits, bits, shape, case.strata, case.topk // case.strata, True)
    for heads in sorted({case.num_heads, groups}):  # of keys and values, and of queries
        x = torch.empty(1, shape.length, 3 if case.fused else 1, heads, case.head_dim, dtype=dtype, device="meta")
        x = x[:, :, 0]
        pooled, _ = run("pool + score", pool.pool, x, groups, shape, scores=True)
        run("pool", pool.pool, x, groups, shape)
        sub = run("gather", gather.gather, x, pooled, rows, shape)
        grad = run("spread", gather.spread, sub, inverse, shape)
    # Attention's output, and so what is scattered back, has the queries' heads.
    run("spread, shifted", gather.spread, sub, inverse, shape, shifted_in=CHUNKS)
    run("spread, shifted, halo", gather.spread, sub, inverse, shape, shifted_in=CHUNKS, halo_CLBHD=halo)
    pooled, _ = run("pool, shifted", pool.pool, grad, groups, shape, shifted_in=CHUNKS)
    run("gather, shifted", gather.gather, grad, pooled, rows, shape, shifted_in=CHUNKS)
    # As many blocks as are held, and once more with what was merged or added before.
    slots = sub.shape[1]
    lse = sub.new_empty(1, case.num_heads, slots, dtype=torch.float32)
    later = sub.new_empty(1, case.num_heads, slots - slots // 2, case.head_dim).transpose(1, 2)
    whole, half = Part(sub, lse=lse), Part(later, slots // 2, lse=lse[..., slots // 2 :])
    for before, more in ((whole, ""), (Part(sub.float(), lse=lse), ", more")):
        parts = [before] + [half] * (AT_ONCE - 1)
        run(f"merge{more}", merge_kernel.merge_in_one_pass, sub, torch.empty_like(lse), parts)
        run(f"add{more}", merge_kernel.add_in_one_pass, sub, parts)
    return found


def resources(launch: Launch, arch: int) -> Record:
    """What a launch takes on an architecture; where it was compiled before, from Triton's cache."""
    source, options = specialized(launch)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {name: int(amount) for name, amount in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "kernel": launch.kernel.__name__,
        "variant": launch.variant,
        "case": launch.case.name,
        "heads": launch.heads,
        "head_dim": launch.case.head_dim,
        "dtype": launch.case.dtype,
        "arch": f"sm_{arch}",
        "warps": compiled.metadata.num_warps,
        "registers": used["REG"],
        "stack_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
    }


def specialized(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton makes of a launch: its parameters' types, constants and divisibility; and the compiler's options."""
    options, types, constants, divisible = dict(launch.values), {}, {}, {}

    def type_of(value: Any, path: tuple[int, ...], constant: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(type_of(one, (*path, index), constant) for index, one in enumerate(value))
        if constant or (isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        pointer = POINTERS[value.dtype] if isinstance(value, Tensor) else None
        if pointer or value % 16 == 0:  # PyTorch aligns memory to more
            divisible[path] = [["tt.divisibility", 16]]
        return pointer or ("i32" if value < 2**31 else "i64")

    for index, parameter in enumerate(launch.kernel.params):
        types[parameter.name] = type_of(options.pop(parameter.name), (index,), parameter.is_constexpr)
    return ASTSource(launch.kernel, types, constants, divisible), options


if __name__ == "__main__":
    sys.exit(main())
