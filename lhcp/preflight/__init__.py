"""Finds bad nodes before a big job; started as `python -m lhcp.preflight`, see `lhcp.preflight.__main__`."""
