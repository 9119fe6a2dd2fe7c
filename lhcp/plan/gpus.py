"""What GPUs, their links and hosts do: every constant that a plan is reckoned with, its unit and its source."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal, NamedTuple, get_type_hints

from lhcp.flops import PEAK_BF16

GpuName = Literal["h100", "h200", "b200"]
GIB = 2**30


class Says(NamedTuple):
    """Of a constant: its unit, and where its value is from."""

    unit: str
    source: str


class Assumption(NamedTuple):
    """A constant that a plan used."""

    name: str
    value: float
    unit: str
    source: str


_SHEET = "data sheet"
_H100 = "measured on an H100"


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in a node. Rates that were measured are fractions of an H100's data sheet, and taken for all."""

    name: str
    memory_gib: Annotated[float, Says("GiB", "what nvidia-smi says of the SXM part")]
    """Of one GPU."""
    peak_flops: Annotated[float, Says("FLOP/s", _SHEET)]
    """Dense bfloat16."""
    memory_bandwidth: Annotated[float, Says("B/s", _SHEET)]
    """Of the GPU's own memory."""
    nvlink: Annotated[float, Says("B/s", _SHEET)]
    """One direction of a GPU's links to the others of its node."""
    network: Annotated[float, Says("B/s", "data sheet of ConnectX-7, 400 Gb/s a GPU")] = 50e9
    """One direction of a GPU's share of the links between nodes."""
    pcie: Annotated[float, Says("B/s", f"{_H100}: 55.3e9 to the host, 54.3e9 from it")] = 54e9
    """One direction between a GPU and pinned host memory."""
    nvlink_latency: Annotated[float, Says("s", "assumed")] = 10e-6
    """From the last byte sent to its arrival inside a node, software included."""
    network_latency: Annotated[float, Says("s", "assumed")] = 20e-6
    """Likewise between nodes."""
    gemm: Annotated[float, Says("of peak_flops", f"{_H100}: 670e12 to 750e12 by shape")] = 0.725
    """That matrix products of a million rows and 1,024 to 3,072 columns reach."""
    attention_forward: Annotated[float, Says("of peak_flops", f"{_H100}: benchmarks/results/latency-*.json")] = 0.586
    """That cuDNN's causal attention reaches, 4 FLOPs for each pair and element of a head: the median of dense attention
    on N and on S for N from 65,536 on. Among them 0.63 on the 65,536 rows of a 1M sequence, 0.50 on all its tokens."""
    attention_backward: Annotated[float, Says("of peak_flops", f"{_H100}: benchmarks/results/latency-*.json")] = 0.549
    """Likewise backward, 10 FLOPs for each."""
    elementwise: Annotated[float, Says("of memory_bandwidth", f"{_H100}: 2.6e12 B/s")] = 0.776
    """That passes over activations reach."""
    copy: Annotated[float, Says("of memory_bandwidth", f"{_H100}: 3.01e12 B/s")] = 0.899
    """That a large copy reaches."""
    lighthouse_over_floor: Annotated[float, Says("times", f"{_H100}: benchmarks/results/latency.md")] = 1.3
    """What Lighthouse takes around attention, over the time that a copy of the bytes that it cannot avoid takes."""
    optimizer_bytes: Annotated[float, Says("B", "counted: 4 float32 read, 3 written")] = 28.0
    """That AdamW moves for a parameter: weight, gradient and both moments read, all but the gradient written."""
    reserve_gib: Annotated[float, Says("GiB", f"{_H100}: 67 GiB of tensors fast, 74.5 slow")] = 11.0
    """Of a GPU's memory, that a run does not get: CUDA's context, NCCL's buffers, workspaces, fragmentation."""
    host_gib: Annotated[float, Says("GiB", "assumed: 2 TB for 8 GPUs, less the rest")] = 200.0
    """A GPU's share of its node's memory, that can be pinned."""

    @property
    def usable_bytes(self) -> float:
        """Of GPU memory, for tensors."""
        return (self.memory_gib - self.reserve_gib) * GIB

    @property
    def host_bytes(self) -> float:
        """Of host memory, that can be pinned for one GPU."""
        return self.host_gib * GIB

    @property
    def gemm_flops(self) -> float:
        """FLOP/s of matrix products."""
        return self.gemm * self.peak_flops

    @property
    def attention_forward_flops(self) -> float:
        """FLOP/s of attention, forward."""
        return self.attention_forward * self.peak_flops

    @property
    def attention_backward_flops(self) -> float:
        """FLOP/s of attention, backward."""
        return self.attention_backward * self.peak_flops

    @property
    def pass_bandwidth(self) -> float:
        """B/s, read and written, of elementwise passes."""
        return self.elementwise * self.memory_bandwidth

    @property
    def around_bandwidth(self) -> float:
        """B/s at which Lighthouse moves the bytes around attention that it cannot avoid."""
        return self.copy * self.memory_bandwidth / self.lighthouse_over_floor

    def assumptions(self) -> list[Assumption]:
        """Every constant, in order."""
        hints = get_type_hints(type(self), include_extras=True)
        told = ((field.name, hints[field.name].__metadata__[0]) for field in fields(self) if field.name != "name")
        return [Assumption(name, getattr(self, name), says.unit, says.source) for name, says in told]


GPUS: dict[GpuName, Gpu] = {
    "h100": Gpu("h100", 79.6, PEAK_BF16["H100"], 3.35e12, 450e9),
    "h200": Gpu("h200", 140.4, PEAK_BF16["H200"], 4.8e12, 450e9),
    "b200": Gpu("b200", 179.1, PEAK_BF16["B200"], 8e12, 900e9),
}
