"""Context parallelism: sharding of sequences, the attention exchange, the halo."""

from lhcp.distributed.context_parallel import ContextParallel

__all__ = ["ContextParallel"]
