"""Lighthouse attention over the ranks of a context-parallel group, and the dense attention it becomes."""

from lhcp.attention.lighthouse import lighthouse_attention
from lhcp.attention.selection import Selection, select, select_from_scores
from lhcp.config import LighthouseConfig

__all__ = ["LighthouseConfig", "Selection", "lighthouse_attention", "select", "select_from_scores"]
