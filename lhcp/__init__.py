"""lhcp: context-parallel long-sequence training with Lighthouse attention."""

__version__ = "0.1.0"
