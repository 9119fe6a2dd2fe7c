"""How ranks share the work."""

from __future__ import annotations

from typing import Literal

from lhcp.config.model import ModelConfig
from lhcp.config.section import ConfigError, PositiveInt, Section

Sharding = Literal["zigzag", "contiguous"]
ExchangeName = Literal["ring", "allgather", "ulysses", "ring_flash_attn"]
BlockBackendName = Literal["auto", "math", "cpu", "cudnn", "flash"]


class ParallelConfig(Section):
    """How ranks share the work: `dp` replicas, each of `cp` ranks that share one sequence."""

    dp: PositiveInt | None = None
    """Data-parallel degree. None: processes / cp."""
    cp: PositiveInt = 1
    """Context-parallel degree W: ranks that hold one sequence together."""
    sharding: Sharding = "zigzag"
    """`zigzag` balances causal work; `contiguous` gives each rank one run of tokens."""
    exchange: ExchangeName = "ring"
    """How shards meet in attention when cp > 1: visible keys and values come rank by rank beside the compute (`ring`);
    or all of them to all ranks at once (`allgather`); or each rank attends with a share of the heads (`ulysses`: cp
    divides num_heads); `ring_flash_attn`: the ring of that package (zigzag, bfloat16, extra `flash`)."""
    block_backend: BlockBackendName = "auto"
    """Kernel of one attention block; `auto` picks by device."""

    @property
    def num_chunks(self) -> int:
        """Runs of tokens that a sequence is split into."""
        return 2 * self.cp if self.sharding == "zigzag" and self.cp > 1 else self.cp

    def resolve(self, world_size: int) -> ParallelConfig:
        """Fix `dp` for `world_size` processes.

        Raises:
            ConfigError: when dp x cp is not the number of processes.
        """
        dp = self.dp if self.dp is not None else world_size // self.cp
        if dp * self.cp != world_size:
            wanted = f"{self.dp * self.cp}" if self.dp is not None else f"a multiple of {self.cp}"
            fitting = world_size // self.cp
            remedy = (
                f"set parallel.dp to {fitting}, or to null to follow from the processes"
                if fitting * self.cp == world_size
                else f"set parallel.cp to a divisor of {world_size}"
            )
            raise ConfigError(
                f"parallel.dp {self.dp or 'unset'} x parallel.cp {self.cp} does not match {world_size} process(es); "
                f"start {wanted}, or {remedy}"
            )
        return self.model_copy(update={"dp": dp})

    def check_exchange(self, model: ModelConfig, dtype: str, device: str) -> None:
        """Refuse an exchange that cannot take a model's heads, the activations' dtype, or the device.

        Raises:
            ConfigError: naming what would do.
        """
        if self.cp == 1:
            return
        if self.exchange == "ulysses":
            ulysses_copies(self.cp, model.num_heads, model.num_kv_heads)
        if self.exchange == "ring_flash_attn":
            wrong = {
                f"parallel.sharding {self.sharding}": self.sharding != "zigzag",
                f"parallel.block_backend {self.block_backend}": self.block_backend != "auto",
                f"activations in {dtype}": dtype != "bfloat16",
                f"device {device}": device == "cpu",
                f"model.head_dim {model.head_dim}": model.head_dim % 8 != 0 or model.head_dim > 256,
            }
            if found := [what for what, is_wrong in wrong.items() if is_wrong]:
                raise ConfigError(
                    f"parallel.exchange ring_flash_attn does not go with {' or '.join(found)}: it takes zigzag "
                    f"sharding, compute_dtype: bfloat16 and heads of 8 to 256 in steps of 8 on GPUs, and has its own "
                    f"kernel (block_backend: auto); use those, or parallel.exchange: ring"
                )


def ulysses_copies(world: int, num_heads: int, num_kv_heads: int) -> int:
    """How often the exchange `ulysses` replicates each KV head, so that every rank has those of its query heads.

    Raises:
        ConfigError: heads that cannot be shared evenly among `world` ranks.
    """
    if num_heads % world or (num_kv_heads % world and world % num_kv_heads):
        raise ConfigError(
            f"exchange 'ulysses' shares {num_heads} query and {num_kv_heads} KV heads among {world} ranks: the ranks "
            f"must divide the query heads, and divide the KV heads or be a multiple of them; use another degree, or "
            f"exchange 'ring' or 'allgather'"
        )
    return max(1, world // num_kv_heads)
