"""Context parallelism: sharding of sequences, the attention exchange, the halo."""

from lhcp.distributed.context_parallel import ContextParallel, check_shapes

__all__ = ["ContextParallel", "check_shapes"]
