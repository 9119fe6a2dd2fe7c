"""Programs that measure. They run from the source tree, as `python -m benchmarks.NAME`."""
